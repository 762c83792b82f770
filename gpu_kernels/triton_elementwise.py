# ruff: noqa: N803  what kernels fix at compile time is upper case, and their language is a part of Python's
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, import-untyped"
"""Triton kernels on rows of activations: norms, sums, gates, softcap, rows moved, and the choice of experts.

All arithmetic is float32, whatever type activations have. Knows nothing about models.
"""

import triton
import triton.language as tl


@triton.jit
def _norm(x, weight, column, columns, eps, BLOCK: tl.constexpr):
    """A row x (BLOCK,), zeros beyond its columns, over the root of its mean square, times weight."""
    inverse = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / columns + eps)
    return x * inverse * tl.load(weight + column, mask=column < columns, other=0.0)


@triton.jit
def rms_norm_kernel(x, weight, out, columns, x_stride, out_stride, eps, BLOCK: tl.constexpr):
    """Programs (tokens, heads); `columns` of a head."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    there = column < columns
    values = tl.load(x + token * x_stride + head * columns + column, mask=there, other=0.0).to(tl.float32)
    result = _norm(values, weight, column, columns, eps, BLOCK)
    tl.store(out + token * out_stride + head * columns + column, result.to(out.dtype.element_ty), mask=there)


@triton.jit
def add_norm_kernel(
    x,
    delta,
    delta_weight,
    weight,
    out,
    columns,
    x_stride,
    delta_stride,
    out_stride,
    eps,
    BLOCK: tl.constexpr,
    NORMS_DELTA: tl.constexpr,
):
    """x += delta or its norm, out = norm of x. Programs: tokens."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there = column < columns
    addend = tl.load(delta + token * delta_stride + column, mask=there, other=0.0).to(tl.float32)
    if NORMS_DELTA:
        addend = _norm(addend, delta_weight, column, columns, eps, BLOCK)
    total = tl.load(x + token * x_stride + column, mask=there, other=0.0).to(tl.float32) + addend
    rounded = total.to(x.dtype.element_ty)
    tl.store(x + token * x_stride + column, rounded, mask=there)
    result = _norm(rounded.to(tl.float32), weight, column, columns, eps, BLOCK)
    tl.store(out + token * out_stride + column, result.to(out.dtype.element_ty), mask=there)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), without overflow."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def elementwise_kernel(
    out,
    x,
    y,
    vector,
    columns,
    out_stride,
    x_stride,
    y_stride,
    number,
    OPERATION: tl.constexpr,
    HAS_VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Operations on single numbers; programs (tokens, blocks of columns).

    "add": out = x + y. "add_gated": out = x + y * sigmoid(vector[token]). "softcap": out = number * tanh(x / number).
    "scale_bias": out = x * number + vector[column]. Else the gate: out = activation(x) * y.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < columns
    left = tl.load(x + token * x_stride + column, mask=there, other=0.0).to(tl.float32)
    right = tl.load(y + token * y_stride + column, mask=there, other=0.0).to(tl.float32)
    if OPERATION == "add":
        result = left + right
    elif OPERATION == "add_gated":
        result = left + right * sigmoid(tl.load(vector + token).to(tl.float32))
    elif OPERATION == "softcap":
        result = number * (2 * sigmoid(2 * left / number) - 1)
    elif OPERATION == "scale_bias":
        result = left * number
        if HAS_VECTOR:
            result += tl.load(vector + column, mask=there, other=0.0)
    elif OPERATION == "silu":
        result = left * sigmoid(left) * right
    elif OPERATION == "gelu":  # x / 2 * (1 + tanh(z)) = x * sigmoid(2 z)
        result = left * sigmoid(1.5957691216057308 * (left + 0.044715 * left * left * left)) * right
    elif OPERATION == "sigmoid":
        result = sigmoid(left) * right
    else:
        positive = tl.maximum(left, 0.0)
        result = positive * positive * right
    tl.store(out + token * out_stride + column, result.to(out.dtype.element_ty), mask=there)


@triton.jit
def gather_kernel(x, index, out, tokens, columns, x_stride, out_stride, BLOCK: tl.constexpr):
    """out[p] = x[index[p]], zeros for an index that x has not. Programs (pairs, blocks of columns)."""
    pair = tl.program_id(0).to(tl.int64)
    source = tl.load(index + pair).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < columns
    known = there & (tl.zeros_like(column) + source >= 0) & (tl.zeros_like(column) + source < tokens)
    values = tl.load(x + source * x_stride + column, mask=known, other=0.0)
    tl.store(out + pair * out_stride + column, values.to(out.dtype.element_ty), mask=there)


@triton.jit
def scatter_kernel(
    out,
    y,
    weights,
    token_of_pair,
    count,
    columns,
    out_stride,
    y_stride,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[t] += sum of weights[p] * y[p] over the token's pairs. Programs (tokens, blocks of columns).

    Pairs are looked at PAIRS at a time, and a token's added one by one: whatever lies between them changes no bit.
    """
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < columns
    total = tl.zeros((BLOCK,), tl.float32)
    pairs = tl.load(count)
    for start in range(0, pairs, PAIRS):
        pair = start + tl.arange(0, PAIRS)
        is_own = (pair < pairs) & (tl.load(token_of_pair + pair, mask=pair < pairs, other=-1) == token)
        left = tl.sum(is_own.to(tl.int32), axis=0)
        for _ in range(0, left):
            own = tl.min(tl.where(is_own, pair, pairs), axis=0)
            terms = tl.load(y + own.to(tl.int64) * y_stride + column, mask=there, other=0.0).to(tl.float32)
            total += terms * tl.load(weights + own)
            is_own = is_own & (pair != own)
    target = out + token.to(tl.int64) * out_stride + column
    before = tl.load(target, mask=there, other=0.0).to(tl.float32)
    tl.store(target, (before + total).to(out.dtype.element_ty), mask=there)


@triton.jit
def route_kernel(
    logits,
    ids,
    weights,
    experts,
    logits_stride,
    ids_stride,
    weights_stride,
    scale,
    least_sum,
    USED: tl.constexpr,
    U: tl.constexpr,
    E: tl.constexpr,
    NORMS: tl.constexpr,
):
    """Programs: tokens. One expert after the other is chosen; of equal logits the lower id first."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, E)
    there = expert < experts
    values = tl.load(logits + token * logits_stride + expert, mask=there, other=-float("inf")).to(tl.float32)
    finite = tl.sum((there & (tl.abs(values) < float("inf"))).to(tl.int32), axis=0) == experts
    values = tl.where(there & (tl.abs(values) < float("inf")), values, -float("inf"))
    most = tl.max(values, axis=0)
    total = tl.sum(tl.where(there, tl.exp(values - most), 0.0), axis=0)
    choice = tl.arange(0, U)
    chosen = tl.zeros((U,), tl.int32)
    shares = tl.zeros((U,), tl.float32)
    left = there
    for number in tl.static_range(USED):
        best = tl.max(tl.where(left, values, -float("inf")), axis=0)
        least = tl.min(tl.where(left & (values == best), expert, E), axis=0)
        chosen = tl.where(choice == number, least, chosen)
        shares = tl.where(choice == number, tl.exp(best - most) / total, shares)
        left = left & (expert != least)
    if NORMS:
        shares = shares / tl.maximum(tl.sum(shares, axis=0), least_sum)
    shares = tl.where(tl.zeros((U,), tl.int32) + finite.to(tl.int32) == 1, shares * scale, float("nan"))
    tl.store(ids + token * ids_stride + choice, chosen, mask=choice < USED)
    tl.store(weights + token * weights_stride + choice, shares, mask=choice < USED)
