"""Products of stacked matrices, one an expert, with the tokens that chose it: rows of a program.

Slots are as in `router`. A *segment* is an expert that has slots; its activations begin on a tile of their own, so that
its product is that of `matmul`, bit for bit the same for a token whichever tokens share the expert. An entry of the
segments' table is four int32: expert, first slot, slots, first column in the activation buffer; slots are 0 in the
entries after the last. The work is done by the operations of `matmul` and `activations`, called once a segment with
addresses moved. Knows nothing about routing or what experts compute.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from cpu_kernels.activations import ActivationBuffer, quantize_row
from cpu_kernels.expert_slots import COUNTER, PLACE_BYTES, TARGET, ExpertSlots, await_part
from cpu_kernels.formats import PanelFormat
from cpu_kernels.isa import ISA
from cpu_kernels.matmul import matmul_row
from cpu_kernels.matrix import Matrix
from cpu_kernels.native import int32_at, operation, set_int32
from cpu_kernels.program import MAX_ARGUMENTS, Field, Row, aligned_int64, times
from cpu_kernels.simd import F32, I32, I64, Kernel, Value
from cpu_kernels.traced import TracedOperation, each, spread

SEGMENT_BYTES = 16
_POINTER = ir.PointerType()
# what the operations' arguments are that differ from segment to segment
_QUANTIZE_SOURCE, _QUANTIZE_TOKENS, _QUANTIZE_OUT = 0, 2, 3
_MATMUL_PANELS, _MATMUL_ACTIVATIONS, _MATMUL_TOKENS, _MATMUL_OUT = 0, 4, 5, 6


def most_segments(tokens: int, used: int, experts: int) -> int:
    """Segments that so many tokens may have."""
    return min(tokens * used, experts)


def most_columns(tokens: int, used: int, experts: int, tile_columns: int) -> int:
    """Columns that the activations of so many tokens' slots may take, every segment's last tile filled up."""
    return tokens * used + most_segments(tokens, used, experts) * (tile_columns // 2)


def segments_row(offsets: int, segments: int, most: Field, *, experts: int, tile_columns: int) -> Row:
    """Fills the table of `most` segments from `router.group_row`'s offsets (experts + 1).

    `tile_columns`: the greatest of the ISAs' whose activation buffers are filled by the table.
    """
    return Row("segments", _segments, 1, (offsets, experts, segments, most, tile_columns))


def quantize_slots_row(source: Matrix, segments: int, most: Field, buffer: ActivationBuffer) -> Row:
    """Fills `buffer` with the rows of `source`, a row a slot. Work items: blocks of 32."""
    row = quantize_row(source.address, source.stride_bytes, 0, buffer)
    column_bytes = buffer.kind.row_bytes(buffer.k)
    template, keep = _template(row)
    return Row(
        "quantize_slots",
        _QUANTIZE.address_for(buffer.isa),
        row.items,
        (template, _address(row), segments, most, source.stride_bytes, column_bytes),
        keep=(keep, *row.keep),
    )


def expert_matmul_row(
    form: PanelFormat,
    panels: int,
    expert_bytes: int,
    rows: int,
    activations: ActivationBuffer,
    *,
    out: Matrix,
    segments: int,
    most: Field,
) -> Row:
    """out[slot] (rows) = the matrix of the slot's expert times its activations; experts `expert_bytes` apart."""
    if out.columns != rows:
        raise ValueError(f"{out.columns} columns for products with {rows} rows")
    place = (form, panels, rows, activations.k, activations, out.address, out.stride_bytes)
    row = matmul_row(*place, activations.capacity)
    groups = form.groups(rows)
    column_bytes = activations.kind.row_bytes(activations.k)
    template, keep = _template(row)
    return Row(
        f"experts_{form.name}",
        _MATMUL.address_for(form.isa),
        times(most, groups),
        (template, _address(row), segments, groups, expert_bytes, out.stride_bytes, column_bytes),
        chunk=max(1, groups // 4),
        keep=(keep, *row.keep),
    )


@dataclass(frozen=True, slots=True)
class Streamed:
    """Experts that lie in slots: their tables, and the layer and part that a product reads."""

    slots: ExpertSlots
    layer: int
    part: int
    status: int  # `Program.status_address`


def streamed_matmul_row(
    form: PanelFormat,
    panels: int,
    streamed: Streamed,
    rows: int,
    activations: ActivationBuffer,
    *,
    out: Matrix,
    segments: int,
    most: Field,
) -> Row:
    """`expert_matmul_row` for experts in slots, `panels` in the first slot; waits for each expert's part to arrive."""
    slots = streamed.slots
    row = expert_matmul_row(form, panels, 0, rows, activations, out=out, segments=segments, most=most)
    waiting = _waiting(streamed)
    places = slots.places(streamed.layer, streamed.part)
    return replace(
        row,
        name=f"streamed_{form.name}",
        function=_STREAMED_MATMUL.address_for(form.isa),
        args=(*row.args, places, int(waiting.ctypes.data), await_part.address),
        keep=(*row.keep, waiting, slots),
    )


def slot_matmul_row(row: Row, streamed: Streamed, tokens: Field, *, isa: ISA) -> Row:
    """A row of `matmul` for a matrix that comes and goes as its layer's only expert, `row` being for the first slot.

    Waits for the matrix's part to arrive. `tokens`: columns of the product, whatever those of `row` are.
    """
    slots = streamed.slots
    template, keep = _template(row)
    waiting = _waiting(streamed)
    places = slots.places(streamed.layer, streamed.part)
    return replace(
        row,
        name=f"slot_{row.name}",
        function=_SLOT_MATMUL.address_for(isa),
        args=(template, _address(row), tokens, places, int(waiting.ctypes.data), await_part.address),
        keep=(keep, *row.keep, waiting, slots),
    )


def scale_slots_row(x: Matrix, scales: int, segments: int, most: Field, *, isa: ISA | None = None) -> Row:
    """x[slot] *= scales[expert of the slot]; `scales`: address of a float32 an expert."""
    return Row("scale_slots", _SCALE.address_for(isa), most, (x.address, x.stride_bytes, x.columns, scales, segments))


def _waiting(streamed: Streamed) -> NDArray[np.int64]:
    """The arguments of `await_part`, those of a place left out."""
    arguments = aligned_int64(MAX_ARGUMENTS)
    arguments[:2] = streamed.slots.settings_address, streamed.status
    return arguments


def _template(row: Row) -> tuple[int, object]:
    """The address of a row's arguments, and what must be kept for it to be valid."""
    arguments = aligned_int64(MAX_ARGUMENTS)
    arguments[: len(row.args)] = np.array(row.args, np.int64)
    return int(arguments.ctypes.data), arguments


def _address(row: Row) -> int:
    return row.function if isinstance(row.function, int) else row.function.address


@operation
def _segments(args: Any, begin: int, end: int) -> None:
    """One item."""
    offsets, experts, segments, most, tile = args[0], args[1], args[2], args[3], args[4]
    entry, column = segments, 0
    for expert in range(experts):
        first = int32_at(offsets + 4 * expert)
        count = int32_at(offsets + 4 * expert + 4) - first
        if count > 0:
            set_int32(entry, expert)
            set_int32(entry + 4, first)
            set_int32(entry + 8, count)
            set_int32(entry + 12, column)
            entry += 16
            rest = count % tile
            width = 1 if rest > 0 else 0
            while width < rest:
                width *= 2
            column += count - rest + width
    while entry < segments + 16 * most:
        set_int32(entry + 8, 0)
        entry += 16


def _entry(k: Kernel, segments: Value, segment: Value) -> tuple[Value, ...]:
    """(expert, first slot, slots, first column) as int64."""
    place = segments + segment * SEGMENT_BYTES
    return tuple(k.load(I32, place + 4 * field).extend(I64, signed=True) for field in range(4))


class _Call:
    """A call of another operation with its arguments copied from a template, some of them changed."""

    def __init__(self, k: Kernel, template: Value, function: Value) -> None:
        self._k = k
        self._template = template
        signature = ir.FunctionType(ir.VoidType(), [_POINTER, I64, I64])
        self._function = k.ir.inttoptr(function.ir, signature.as_pointer())
        self._arguments = k.scratch(8 * MAX_ARGUMENTS)
        with k.loop(0, 8 * MAX_ARGUMENTS, 8) as place:
            k.store(k.load(I64, template + place), self._arguments + place)

    def set(self, argument: int, value: Value) -> None:
        """Sets an argument."""
        self._k.store(value, self._arguments + 8 * argument)

    def move(self, argument: int, distance: Value) -> None:
        """Sets an argument to the template's and so much more."""
        self.set(argument, self._k.load(I64, self._template + 8 * argument) + distance)

    def call(self, begin: Value, end: Value) -> None:
        """Calls the operation for some of its items."""
        k = self._k
        k.ir.call(self._function, [k.ir.inttoptr(self._arguments.ir, _POINTER), begin.ir, end.ir])


def _trace_quantize(k: Kernel) -> None:
    template, function, segments, most, stride, column_bytes = (k.arg(index) for index in range(6))
    call = _Call(k, template, function)
    with k.loop(0, most) as segment:
        _, first_slot, count, first_column = _entry(k, segments, segment)
        call.move(_QUANTIZE_SOURCE, first_slot * stride)
        call.move(_QUANTIZE_OUT, first_column * column_bytes)
        call.set(_QUANTIZE_TOKENS, count)
        with k.when(count > 0):
            call.call(k.begin, k.end)


def _trace_matmul(k: Kernel) -> None:
    expert_bytes = k.arg(4)
    _each_segment(k, lambda expert: expert * expert_bytes)


def _trace_streamed_matmul(k: Kernel) -> None:
    places, template, function = (k.arg(index) for index in range(7, 10))
    wait = _Call(k, template, function)
    _each_segment(k, lambda expert: _distance_once_there(k, wait, places + expert * PLACE_BYTES))


def _trace_slot_matmul(k: Kernel) -> None:
    template, function, tokens, place, waiting, await_function = (k.arg(index) for index in range(6))
    call, wait = _Call(k, template, function), _Call(k, waiting, await_function)
    call.move(_MATMUL_PANELS, _distance_once_there(k, wait, place))
    call.set(_MATMUL_TOKENS, tokens)
    call.call(k.begin, k.end)


def _distance_once_there(k: Kernel, wait: "_Call", place: Value) -> Value:
    """Bytes from the first slot to the one of the expert at this place of the table, once its part has arrived."""
    wait.set(2, k.load(I64, place + COUNTER))
    wait.set(3, k.load(I64, place + TARGET))
    wait.call(k.int64(0), k.int64(1))
    return k.load(I64, place)


def _each_segment(k: Kernel, distance: Callable[[Value], Value]) -> None:
    """Products of all segments' experts, whose panels lie so far behind the first. Items: row groups, in order."""
    template, function, segments, groups, _, out_stride, column_bytes = (k.arg(index) for index in range(7))
    call = _Call(k, template, function)
    with k.loop(k.begin // groups, (k.end + (groups - 1)) // groups) as segment:
        expert, first_slot, count, first_column = _entry(k, segments, segment)
        call.move(_MATMUL_ACTIVATIONS, first_column * column_bytes)
        call.move(_MATMUL_OUT, first_slot * out_stride)
        call.set(_MATMUL_TOKENS, count)
        first = segment * groups
        with k.when(count > 0):
            call.move(_MATMUL_PANELS, distance(expert))
            call.call(k.maximum(k.begin - first, k.int64(0)), k.minimum(k.end - first, groups))


def _trace_scale(k: Kernel) -> None:
    x, stride, columns, scales, segments = (k.arg(index) for index in range(5))
    with k.loop(k.begin, k.end) as segment:
        expert, first_slot, count, _ = _entry(k, segments, segment)
        with k.when(count > 0):
            factor = k.load(F32, scales + expert * 4)
            with k.loop(first_slot, first_slot + count) as slot:
                row = x + slot * stride

                def body(at: Value, kind: Any, row: Value = row, factor: Value = factor) -> None:
                    k.store(k.load(kind, row + at) * spread(k, factor, kind), row + at)

                each(k, columns, body)


_QUANTIZE = TracedOperation("quantize_slots", _trace_quantize)
_MATMUL = TracedOperation("expert_matmul", _trace_matmul)
_STREAMED_MATMUL = TracedOperation("streamed_matmul", _trace_streamed_matmul)
_SLOT_MATMUL = TracedOperation("slot_matmul", _trace_slot_matmul)
_SCALE = TracedOperation("scale_slots", _trace_scale)
