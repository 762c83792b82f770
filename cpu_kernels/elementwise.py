"""Norms, residual sums, gates, factors and biases: rows of a program that work on float32 activations.

Every function makes a `Row` from matrices (`Matrix`) and the number of tokens. Knows nothing about models. Results for
a token do not depend on the other tokens or on the threads. `isa`: None for the one in use.
"""

from collections.abc import Callable
from functools import partial

from cpu_kernels.isa import ISA
from cpu_kernels.matrix import Matrix, require_columns
from cpu_kernels.native import float_bits
from cpu_kernels.program import Field, Row, times
from cpu_kernels.simd import F32, Kernel, Value
from cpu_kernels.traced import TracedOperation, each, gelu, normalise, sigmoid, silu, spread, tanh

Compute = Callable[[Kernel, Value, Value, Value, Value], Value]  # kernel, x, y, token, byte offset in the row

BLOCK_COLUMNS = 1024  # of a row of activations: what one item of an operation on single numbers is


def rms_norm_row(
    out: Matrix,
    x: Matrix,
    weight: int,
    tokens: Field,
    *,
    eps: float,
    heads: int = 1,
    weight_offset: float = 0.0,
    isa: ISA | None = None,
) -> Row:
    """out = x / sqrt(mean(x^2) + eps) * (weight + weight_offset) (arXiv:1910.07467); `out` may be `x`.

    The mean is that of each of `heads` equal parts of a row; `weight`: the address of as many numbers as a part has.
    """
    require_columns("rms_norm", x.columns, out)
    if heads < 1 or x.columns % heads:
        raise ValueError(f"rms_norm: {x.columns} columns in {heads} heads")
    args = (
        *(out.address, out.stride_bytes, x.address, x.stride_bytes, weight, x.columns // heads, heads),
        *(float_bits(eps), float_bits(weight_offset)),
    )
    return Row("rms_norm", _RMS_NORM.address_for(isa), times(tokens, heads), args)


def add_norm_row(
    x: Matrix,
    delta: Matrix,
    out: Matrix,
    weight: int,
    tokens: Field,
    *,
    eps: float,
    delta_weight: int | None = None,
    weight_offset: float = 0.0,
    isa: ISA | None = None,
) -> Row:
    """x += delta, out = rms_norm(x) * (weight + weight_offset).

    With `delta_weight` (an address) the sum is x += rms_norm(delta) * (delta_weight + weight_offset), and `delta` is
    overwritten.
    """
    require_columns("add_norm", x.columns, delta, out)
    args = (
        *(
            x.address,
            x.stride_bytes,
            delta.address,
            delta.stride_bytes,
            out.address,
            out.stride_bytes,
            weight,
            x.columns,
        ),
        *(float_bits(eps), float_bits(weight_offset), delta_weight or 0),
    )
    operation = _ADD_NORM if delta_weight is None else _ADD_NORMED_NORM
    return Row("add_norm", operation.address_for(isa), tokens, args)


def gate_row(out: Matrix, gate: Matrix, up: Matrix, tokens: Field, *, activation: str, isa: ISA | None = None) -> Row:
    """out = activation(gate) * up with `activation` "silu", "gelu" (tanh form), "relu2" (squared) or "sigmoid"."""
    if activation not in _GATES:
        raise ValueError(f"activation {activation!r} is none of {', '.join(_GATES)}")
    return _blocks_row(_GATES[activation], (out, gate, up), tokens, isa)


def add_row(out: Matrix, x: Matrix, y: Matrix, tokens: Field, *, isa: ISA | None = None) -> Row:
    """out = x + y."""
    return _blocks_row(_ADD, (out, x, y), tokens, isa)


def add_gated_row(out: Matrix, x: Matrix, y: Matrix, gate: Matrix, tokens: Field, *, isa: ISA | None = None) -> Row:
    """out = x + y * sigmoid(gate), where `gate` has one column: how a shared expert is added."""
    require_columns("add_gated", 1, gate)
    return _blocks_row(_ADD_GATED, (out, x, y), tokens, isa, (gate.address, gate.stride_bytes))


def scale_bias_row(
    x: Matrix, tokens: Field, *, scale: float = 1.0, bias: int | None = None, isa: ISA | None = None
) -> Row:
    """x = x * scale + bias, where `bias` is the address of a number a column, or None."""
    if bias is None:
        return _blocks_row(_SCALE, (x, x, x), tokens, isa, (float_bits(scale),))
    return _blocks_row(_SCALE_BIAS, (x, x, x), tokens, isa, (float_bits(scale), bias))


def softcap_row(x: Matrix, tokens: Field, *, cap: float, isa: ISA | None = None) -> Row:
    """x = cap * tanh(x / cap)."""
    return _blocks_row(_SOFTCAP, (x, x, x), tokens, isa, (float_bits(cap), float_bits(1.0 / cap)))


def _blocks_row(
    operation: TracedOperation,
    matrices: tuple[Matrix, Matrix, Matrix],
    tokens: Field,
    isa: ISA | None,
    rest: tuple[int, ...] = (),
) -> Row:
    """Arguments: out, x, y with their strides, columns, blocks a row, then `rest`; an item is a block of a row."""
    out, x, y = matrices
    require_columns(operation.name, out.columns, x, y)
    blocks = -(-out.columns // BLOCK_COLUMNS)
    places = (out.address, out.stride_bytes, x.address, x.stride_bytes, y.address, y.stride_bytes)
    return Row(
        operation.name,
        operation.address_for(isa),
        times(tokens, blocks),
        (*places, out.columns, blocks, *rest),
    )


def _trace_rms_norm(k: Kernel) -> None:
    out, out_stride, x, x_stride, weight, columns, heads = (k.arg(index) for index in range(7))
    eps, offset = k.float_arg(7), k.float_arg(8)
    with k.loop(k.begin, k.end) as item:
        token, part = item // heads, (item % heads) * columns * 4
        normalise(
            k,
            out + token * out_stride + part,
            x + token * x_stride + part,
            weight=weight,
            columns=columns,
            eps=eps,
            offset=offset,
        )


def _trace_add_norm(k: Kernel, *, norm_delta: bool) -> None:
    x, x_stride, delta, delta_stride, out, out_stride, weight, columns = (k.arg(index) for index in range(8))
    eps, offset = k.float_arg(8), k.float_arg(9)
    with k.loop(k.begin, k.end) as token:
        row, addend = x + token * x_stride, delta + token * delta_stride
        if norm_delta:
            normalise(k, addend, addend, weight=k.arg(10), columns=columns, eps=eps, offset=offset)
        each(k, columns, lambda at, kind: k.store(k.load(kind, row + at) + k.load(kind, addend + at), row + at))
        normalise(k, out + token * out_stride, row, weight=weight, columns=columns, eps=eps, offset=offset)


def _trace_blocks(k: Kernel, compute: Compute) -> None:
    """out[i] = compute(k, x[i], y[i], token, byte offset of i) for the items' blocks of columns."""
    out, out_stride, x, x_stride, y, y_stride, columns, blocks = (k.arg(index) for index in range(8))
    with k.loop(k.begin, k.end) as item:
        token, start = item // blocks, (item % blocks) * BLOCK_COLUMNS
        count = k.minimum(columns - start, k.int64(BLOCK_COLUMNS))
        first = start * 4
        to, left, right = (
            base + token * stride + first for base, stride in ((out, out_stride), (x, x_stride), (y, y_stride))
        )

        def body(at: Value, kind: object, to: Value = to, left: Value = left, right: Value = right) -> None:
            result = compute(k, k.load(kind, left + at), k.load(kind, right + at), token, first + at)
            k.store(result, to + at)

        each(k, count, body)


def _add_gated(k: Kernel, x: Value, y: Value, token: Value, _at: Value) -> Value:
    gate = sigmoid(k, k.load(F32, k.arg(8) + token * k.arg(9)))
    return k.fma(y, spread(k, gate, y.type), x)


def _scale_bias(k: Kernel, x: Value, _y: Value, _token: Value, at: Value) -> Value:
    return k.fma(x, spread(k, k.float_arg(8), x.type), k.load(x.type, k.arg(9) + at))


def _softcap(k: Kernel, x: Value, _y: Value, _token: Value, _at: Value) -> Value:
    return tanh(k, x * spread(k, k.float_arg(9), x.type)) * spread(k, k.float_arg(8), x.type)


_RMS_NORM = TracedOperation("rms_norm", _trace_rms_norm)
_ADD_NORM = TracedOperation("add_norm", partial(_trace_add_norm, norm_delta=False))
_ADD_NORMED_NORM = TracedOperation("add_normed_norm", partial(_trace_add_norm, norm_delta=True))
_ADD = TracedOperation("add", partial(_trace_blocks, compute=lambda _k, x, y, _token, _at: x + y))
_ADD_GATED = TracedOperation("add_gated", partial(_trace_blocks, compute=_add_gated))
_SCALE = TracedOperation(
    "scale", partial(_trace_blocks, compute=lambda k, x, _y, _token, _at: x * spread(k, k.float_arg(8), x.type))
)
_SCALE_BIAS = TracedOperation("scale_bias", partial(_trace_blocks, compute=_scale_bias))
_SOFTCAP = TracedOperation("softcap", partial(_trace_blocks, compute=_softcap))
_GATES = {
    name: TracedOperation(f"{name}_gate", partial(_trace_blocks, compute=compute))
    for name, compute in {
        "silu": lambda k, gate, up, _token, _at: silu(k, gate) * up,
        "gelu": lambda k, gate, up, _token, _at: gelu(k, gate) * up,
        "sigmoid": lambda k, gate, up, _token, _at: sigmoid(k, gate) * up,
        "relu2": lambda k, gate, up, _token, _at: (
            k.maximum(gate, k.constant(gate.type, 0.0)) * k.maximum(gate, k.constant(gate.type, 0.0)) * up
        ),
    }.items()
}
