"""The greatest of a row of logits, or the k greatest, over vocabularies of 128k and more.

Blocks of a row are searched by all threads, then merged; equal logits count in the order of their indices, NaN never.
Knows nothing about tokens or sampling.
"""

from typing import Any

from cpu_kernels.isa import ISA
from cpu_kernels.matrix import Matrix
from cpu_kernels.native import float_at, int32_at, operation, set_float, set_int32
from cpu_kernels.program import Field, Row, times
from cpu_kernels.simd import F32, I32, Kernel, Value
from cpu_kernels.traced import TracedOperation

BLOCK_COLUMNS = 4096
MAX_TOP_K = 1024
LOWEST = float("-inf")


def blocks_of(columns: int) -> int:
    """Blocks of a row."""
    return -(-columns // BLOCK_COLUMNS)


def argmax_rows(
    logits: Matrix, scratch: int, out_ids: int, tokens: Field, *, isa: ISA | None = None
) -> tuple[Row, Row]:
    """out_ids[token] (int32) = the index of the greatest logit, the lowest where several are; 0 if none is a number.

    `scratch`: address of 8 * tokens * blocks_of(columns) bytes.
    """
    blocks = blocks_of(logits.columns)
    return (
        Row(
            "argmax_blocks",
            _ARGMAX.address_for(isa),
            times(tokens, blocks),
            (logits.address, logits.stride_bytes, logits.columns, blocks, scratch),
        ),
        Row("argmax_merge", _merge, tokens, (scratch, blocks, 1, 1, 0, out_ids)),
    )


def top_k_rows(
    logits: Matrix, scratch: int, out_values: int, out_ids: int, tokens: Field, *, top_k: int
) -> tuple[Row, Row]:
    """The `top_k` greatest logits (tokens, top_k) float32, falling, and their indices int32; -1 where there are none.

    `scratch`: address of 8 * tokens * blocks_of(columns) * top_k bytes.
    """
    if not 0 < top_k <= min(MAX_TOP_K, logits.columns):
        raise ValueError(f"top_k {top_k} of {logits.columns} logits (at most {MAX_TOP_K})")
    blocks = blocks_of(logits.columns)
    return (
        Row(
            "top_k_blocks",
            _top_k,
            times(tokens, blocks),
            (logits.address, logits.stride_bytes, logits.columns, blocks, scratch, top_k),
        ),
        Row("top_k_merge", _merge, tokens, (scratch, blocks, top_k, top_k, out_values, out_ids)),
    )


def _trace_argmax(k: Kernel) -> None:
    """Items: blocks, row after row. Each leaves (greatest float32, its index int32) in the scratch."""
    logits, stride, columns, blocks, scratch = (k.arg(index) for index in range(5))
    with k.loop(k.begin, k.end) as item:
        row, start = logits + item // blocks * stride, item % blocks * BLOCK_COLUMNS
        stop = k.minimum(start + BLOCK_COLUMNS, columns)
        most = k.variable(k.constant(k.floats, LOWEST))
        where = k.variable(k.splat(start.truncate(I32)))
        lanes = k.table(I32, range(k.lanes))
        whole = start + ((stop - start) & -k.lanes)
        with k.loop(start, whole, k.lanes) as column:
            value = k.load(k.floats, row + column * 4)
            greater = value > most.get()
            most.set(k.select(greater, value, most.get()))
            where.set(k.select(greater, k.splat(column.truncate(I32)) + lanes, where.get()))
        best, index = k.variable(k.constant(F32, LOWEST)), k.variable(start.truncate(I32))
        for lane in range(k.lanes):
            _take_if_better(k, best, index, most.get().lane(lane), where.get().lane(lane))
        with k.loop(whole, stop) as column:
            _take_if_better(k, best, index, k.load(F32, row + column * 4), column.truncate(I32))
        k.store(best.get(), scratch + item * 8)
        k.store(index.get(), scratch + item * 8 + 4)


def _take_if_better(k: Kernel, best: Any, index: Any, value: Value, at: Value) -> None:
    better = (value > best.get()) | (value.equals(best.get()) & (at < index.get()))
    best.set(k.select(better, value, best.get()))
    index.set(k.select(better, at, index.get()))


@operation
def _top_k(args: Any, begin: int, end: int) -> None:
    """Items: blocks, row after row. Each leaves its k greatest (float32, int32), falling, in the scratch."""
    columns, blocks, top_k = args[2], args[3], args[5]
    for item in range(begin, end):
        row = args[0] + item // blocks * args[1]
        start = item % blocks * BLOCK_COLUMNS
        stop = min(start + BLOCK_COLUMNS, columns)
        best = args[4] + item * top_k * 8
        for place in range(top_k):
            set_float(best + 8 * place, LOWEST)
            set_int32(best + 8 * place + 4, -1)
        least = LOWEST
        for column in range(start, stop):
            value = float_at(row + 4 * column)
            if value > least:
                place = top_k - 1
                while place > 0 and float_at(best + 8 * (place - 1)) < value:
                    set_float(best + 8 * place, float_at(best + 8 * (place - 1)))
                    set_int32(best + 8 * place + 4, int32_at(best + 8 * (place - 1) + 4))
                    place -= 1
                set_float(best + 8 * place, value)
                set_int32(best + 8 * place + 4, column)
                least = float_at(best + 8 * (top_k - 1))


@operation
def _merge(args: Any, begin: int, end: int) -> None:
    """Items: rows. Takes the greatest head of the blocks' lists, `wanted` times; the lists' marks are in their ids."""
    scratch, blocks, length, wanted, out_values, out_ids = args[0], args[1], args[2], args[3], args[4], args[5]
    for row in range(begin, end):
        lists = scratch + row * blocks * length * 8
        last_value, last_id = -LOWEST, -1
        for place in range(wanted):
            best_value, best_id = LOWEST, -1
            for block in range(blocks):
                for entry in range(length):
                    value = float_at(lists + 8 * (block * length + entry))
                    index = int32_at(lists + 8 * (block * length + entry) + 4)
                    # within a list values fall: the first that was not taken is its greatest
                    if index >= 0 and (value < last_value or (value == last_value and index > last_id)):
                        if value > best_value or best_id < 0:
                            best_value, best_id = value, index
                        break
            if out_values != 0:
                set_float(out_values + 4 * (row * wanted + place), best_value)
            set_int32(out_ids + 4 * (row * wanted + place), best_id)
            last_value, last_id = best_value, best_id


_ARGMAX = TracedOperation("argmax", _trace_argmax)
