"""A layer's routed experts shared out between a GPU and the CPU: the row that decides.

An expert that has a place on the GPU is computed there by tables this row writes; the pairs that are left get slots as
`router.group_row` gives them (pairs and slots are as there); the others have slot -1.
Knows nothing about GPUs but the tables' form.

The GPU's tables are one block of int32 (`SplitTables`): how many pairs are the GPU's; segments (place, first pair,
pairs, expert) of experts whose place was there before, then of those that are brought for this step, with 0 pairs after
the last; the token of every pair; its weight as float32. The GPU's pairs are in the order of experts, then tokens,
whatever the places are, so that the order of its sums does not depend on them.
"""

import math
from dataclasses import dataclass
from typing import Any

from cpu_kernels.native import (
    atomic_load,
    atomic_swap_if,
    call_operation,
    float_at,
    int32_at,
    int_at,
    jitted,
    operation,
    set_float,
    set_int,
    set_int32,
)
from cpu_kernels.program import Field, Row, times
from cpu_kernels.python_calls import PythonCall
from cpu_kernels.router import NOT_FINITE

HEADER = 4  # int32 before the segments
SEGMENT = 4  # int32 of a segment


@dataclass(frozen=True, slots=True)
class SplitTables:
    """Where the parts of the GPU's tables begin, in int32, for so many segments and pairs."""

    segments: int
    pairs: int

    @property
    def resident(self) -> int:
        """Of segments of experts whose place was there before."""
        return HEADER

    @property
    def brought(self) -> int:
        """Of segments of experts that are brought for the step."""
        return HEADER + SEGMENT * self.segments

    @property
    def tokens(self) -> int:
        """Of the pairs' tokens."""
        return HEADER + 2 * SEGMENT * self.segments

    @property
    def weights(self) -> int:
        """Of the pairs' weights."""
        return self.tokens + self.pairs

    @property
    def length(self) -> int:
        """Of all."""
        return self.weights + self.pairs


@dataclass(frozen=True, slots=True)
class LayerPlaces:
    """Addresses of what tells where a layer's experts are, and `brought`: the first place of those that are brought.

    `resident` (experts) int32: the place of every expert, or -1. `counts` (2, experts) int64: gets the pairs of every
    expert in the first row. `where` (experts) int32: a copy of `resident` that `Choose` may change.
    """

    resident: int
    counts: int
    where: int
    brought: int


@dataclass(frozen=True, slots=True)
class HostTables:
    """Addresses of the CPU's tables, as `router.group_row` fills them; -1 for the pairs and slots of the GPU."""

    offsets: int
    slot_of_pair: int
    token_of_slot: int


def split_row(
    topk_ids: int,
    topk_weights: int,
    tokens: Field,
    *,
    used: int,
    experts: int,
    places: LayerPlaces,
    host: HostTables,
    tables: int,
    segments: Field,
    status: int,
    choose: PythonCall | None = None,
) -> Row:
    """Shares the pairs of ids and weights (tokens, used) out; `tables`: a block of `SplitTables(segments, pairs)`.

    `choose` is called when the pairs of every expert are counted; it may change which experts have places in this step.
    `status`: `Program.status_address`, set to `router.NOT_FINITE` by weights that are no numbers or ids of no expert.
    """
    args = (
        *(topk_ids, topk_weights, times(tokens, used), used, experts),
        *(places.resident, places.counts, places.where, places.brought),
        *(host.offsets, host.slot_of_pair, host.token_of_slot, tables, segments),
        *(0 if choose is None else choose.address, status),
    )
    return Row("split_experts", _split, 1, args, keep=(choose,))


@operation
def _split(args: Any, begin: int, end: int) -> None:
    """One item. The second row of counts holds where the next pair of an expert goes."""
    ids, weights, pairs, used, experts = args[0], args[1], args[2], args[3], args[4]
    resident, counts, where, tables, most = args[5], args[6], args[7], args[12], args[13]
    for expert in range(experts):
        set_int32(where + 4 * expert, int32_at(resident + 4 * expert))
    if not count_pairs(ids, weights, pairs, counts, experts):
        atomic_swap_if(args[15], 0, NOT_FINITE)
        return
    if args[14] != 0:
        call_operation(args[14], counts, 0, 0)
        if atomic_load(args[15]) != 0:
            return
    left = write_segments(counts, where, args[8], args[9], tables, most, experts)
    next_of, tokens = counts + 8 * experts, tables + 4 * (HEADER + 2 * SEGMENT * most)
    slot_of_pair, token_of_slot = args[10], args[11]
    for pair in range(pairs):
        expert = int32_at(ids + 4 * pair)
        at = int_at(next_of + 8 * expert)
        set_int(next_of + 8 * expert, at + 1)
        if int32_at(where + 4 * expert) < 0:
            set_int32(slot_of_pair + 4 * pair, at)
            set_int32(token_of_slot + 4 * at, pair // used)
        else:
            set_int32(slot_of_pair + 4 * pair, -1)
            set_int32(tokens + 4 * at, pair // used)
            set_float(tokens + 4 * (pairs + at), float_at(weights + 4 * pair))
    for slot in range(left, pairs):
        set_int32(token_of_slot + 4 * slot, -1)
    for pair in range(pairs - left, pairs):
        set_int32(tokens + 4 * pair, 0)
        set_float(tokens + 4 * (pairs + pair), 0.0)


@jitted("boolean(int64, int64, int64, int64, int64)")
def count_pairs(ids: int, weights: int, pairs: int, counts: int, experts: int) -> bool:
    """Counts the pairs of every expert; whether all ids are experts' and all weights numbers."""
    for expert in range(experts):
        set_int(counts + 8 * expert, 0)
    for pair in range(pairs):
        expert = int32_at(ids + 4 * pair)
        if expert < 0 or expert >= experts or not math.isfinite(float_at(weights + 4 * pair)):
            return False
        set_int(counts + 8 * expert, int_at(counts + 8 * expert) + 1)
    return True


@jitted("int64(int64, int64, int64, int64, int64, int64, int64)")
def write_segments(counts: int, where: int, brought: int, offsets: int, tables: int, most: int, experts: int) -> int:
    """Writes the GPU's counts and segments, the CPU's offsets, and where pairs go; returns the CPU's pairs."""
    old_end = tables + 4 * HEADER
    new_end = old_end + 4 * SEGMENT * most
    here, there = 0, 0
    set_int32(offsets, 0)
    for expert in range(experts):
        count, place = int_at(counts + 8 * expert), int32_at(where + 4 * expert)
        set_int(counts + 8 * (experts + expert), here if place < 0 else there)
        if place < 0:
            here += count
        elif count > 0:
            if place < brought:
                entry = old_end
                old_end += 4 * SEGMENT
            else:
                entry = new_end
                new_end += 4 * SEGMENT
            set_int32(entry, place)
            set_int32(entry + 4, there)
            set_int32(entry + 8, count)
            set_int32(entry + 12, expert)
            there += count
        set_int32(offsets + 4 * (expert + 1), here)
    old_most = tables + 4 * (HEADER + SEGMENT * most)
    set_int32(tables, there)
    set_int32(tables + 4, most - (old_most - old_end) // (4 * SEGMENT))
    set_int32(tables + 8, (new_end - old_most) // (4 * SEGMENT))
    while old_end < old_most:
        set_int32(old_end + 8, 0)
        old_end += 4 * SEGMENT
    while new_end < old_most + 4 * SEGMENT * most:
        set_int32(new_end + 8, 0)
        new_end += 4 * SEGMENT
    return here
