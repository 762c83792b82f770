"""Routed experts: which ones a token uses and with what weights, tokens ordered by expert, and outputs joined again.

A *pair* is (token, choice): pair = token * used + choice. A *slot* is a row of a batch in which the pairs of one
expert lie side by side: experts in rising order, tokens in rising order within. Tables are int32. Knows nothing about
how experts compute.
"""

import math
from typing import Any

from cpu_kernels.isa import ISA
from cpu_kernels.matrix import Matrix, require_columns
from cpu_kernels.native import (
    float_at,
    float_bits,
    float_of,
    int32_at,
    operation,
    set_float,
    set_int,
    set_int32,
)
from cpu_kernels.program import Field, Row, times
from cpu_kernels.simd import F32, I32, I64, Kernel, Value
from cpu_kernels.traced import TracedOperation, each, spread

SMALLEST_WEIGHT_SUM = 2.0**-14  # the least number that float16 holds without loss of precision
NOT_FINITE = 101  # the error code for router logits that are not numbers
MAX_EXPERTS = 4096


def route_row(
    logits: Matrix,
    topk_ids: int,
    topk_weights: int,
    tokens: Field,
    *,
    used: int,
    norm: bool,
    scale: float,
    status: int,
) -> Row:
    """Softmax of the logits (tokens, experts); the `used` greatest probabilities, the lower id first where equal.

    Writes ids (tokens, used) int32 and weights (tokens, used) float32: the probabilities, with `norm` divided by their
    sum (at least 2^-14), times `scale`. `status`: `Program.status_address`, set to NOT_FINITE by infinite or NaN ones.
    """
    if not 0 < used <= logits.columns <= MAX_EXPERTS:
        raise ValueError(f"route: {used} of {logits.columns} experts (at most {MAX_EXPERTS})")
    args = (logits.address, logits.stride_bytes, logits.columns, topk_ids, topk_weights, used, int(norm))
    return Row("route", _route, tokens, (*args, float_bits(scale), status))


def group_row(
    topk_ids: int, tokens: Field, *, used: int, experts: int, offsets: int, slot_of_pair: int, token_of_slot: int
) -> Row:
    """Gives every pair its slot. Writes offsets (experts + 1): where each expert's slots begin, then their number."""
    args = (topk_ids, times(tokens, used), used, experts, offsets, slot_of_pair, token_of_slot)
    return Row("group_by_expert", _group, 1, args)


def gather_row(out: Matrix, x: Matrix, token_of_slot: int, slots: Field, *, isa: ISA | None = None) -> Row:
    """out[slot] = x[token of the slot]; a slot of token -1 stays as it is."""
    require_columns("gather", x.columns, out)
    args = (out.address, out.stride_bytes, x.address, x.stride_bytes, x.columns, token_of_slot)
    return Row("gather", _GATHER.address_for(isa), slots, args)


def combine_row(
    out: Matrix,
    expert_outputs: Matrix,
    topk_weights: int,
    slot_of_pair: int,
    tokens: Field,
    *,
    used: int,
    isa: ISA | None = None,
) -> Row:
    """out[token] = sum over its pairs, in order, of weight * expert_outputs[slot of the pair]; slot -1: none of it."""
    require_columns("combine", out.columns, expert_outputs)
    args = (
        *(out.address, out.stride_bytes, expert_outputs.address, expert_outputs.stride_bytes, out.columns),
        *(topk_weights, slot_of_pair, used),
    )
    return Row("combine", _COMBINE.address_for(isa), tokens, args)


@operation
def _route(args: Any, begin: int, end: int) -> None:
    """Probabilities are exp(logit - greatest) / sum, summed in float64 in the order of the experts."""
    experts, used = args[2], args[5]
    scale = float_of(args[7])
    for token in range(begin, end):
        logits = args[0] + token * args[1]
        ids, weights = args[3] + token * used * 4, args[4] + token * used * 4
        total, most, finite = 0.0, float_at(logits), True
        for expert in range(experts):
            value = float_at(logits + 4 * expert)
            most = max(most, value)
            finite = finite and math.isfinite(value)
        if not finite:
            set_int(args[8], NOT_FINITE)
            return
        for expert in range(experts):
            total += math.exp(float_at(logits + 4 * expert) - most)
        # choice by choice: the greatest logit after the last chosen, in the order (value falling, id rising)
        last_value, last_id, chosen_sum = math.inf, -1, 0.0
        for choice in range(used):
            best_value, best_id = -math.inf, -1
            for expert in range(experts):
                value = float_at(logits + 4 * expert)
                is_left = value < last_value or (value == last_value and expert > last_id)
                if is_left and value > best_value:
                    best_value, best_id = value, expert
            probability = math.exp(best_value - most) / total
            chosen_sum += probability
            set_int32(ids + 4 * choice, best_id)
            set_float(weights + 4 * choice, probability)
            last_value, last_id = best_value, best_id
        divisor = max(chosen_sum, SMALLEST_WEIGHT_SUM) if args[6] != 0 else 1.0
        for choice in range(used):
            place = weights + 4 * choice
            set_float(place, float_at(place) / divisor * scale)


@operation
def _group(args: Any, begin: int, end: int) -> None:
    """A counting sort; one item."""
    ids, pairs, used, experts, offsets, slot_of_pair, token_of_slot = (
        args[0],
        args[1],
        args[2],
        args[3],
        args[4],
        args[5],
        args[6],
    )
    for expert in range(experts + 1):
        set_int32(offsets + 4 * expert, 0)
    for pair in range(pairs):
        place = offsets + 4 * (int32_at(ids + 4 * pair) + 1)
        set_int32(place, int32_at(place) + 1)
    for expert in range(experts):
        set_int32(offsets + 4 * (expert + 1), int32_at(offsets + 4 * (expert + 1)) + int32_at(offsets + 4 * expert))
    for pair in range(pairs):
        place = offsets + 4 * int32_at(ids + 4 * pair)
        slot = int32_at(place)
        set_int32(slot_of_pair + 4 * pair, slot)
        set_int32(token_of_slot + 4 * slot, pair // used)
        set_int32(place, slot + 1)
    # every offset has moved to the next expert's
    for expert in range(experts, 0, -1):
        set_int32(offsets + 4 * expert, int32_at(offsets + 4 * (expert - 1)))
    set_int32(offsets, 0)


def _trace_gather(k: Kernel) -> None:
    out, out_stride, x, x_stride, columns, tokens = (k.arg(index) for index in range(6))
    with k.loop(k.begin, k.end) as slot:
        token = k.load(I32, tokens + slot * 4).extend(I64, signed=True)
        with k.when(token >= 0):
            source, to = x + token * x_stride, out + slot * out_stride

            def body(at: Value, kind: Any, source: Value = source, to: Value = to) -> None:
                k.store(k.load(kind, source + at), to + at)

            each(k, columns, body)


def _trace_combine(k: Kernel) -> None:
    out, out_stride, rows, rows_stride, columns, weights, slots, used = (k.arg(index) for index in range(8))
    with k.loop(k.begin, k.end) as token:
        first = token * used * 4

        def body(at: Value, kind: Any, token: Value = token, first: Value = first) -> None:
            total = k.variable(k.constant(kind, 0.0))
            with k.loop(0, used) as choice:
                pair = first + choice * 4
                slot = k.load(I32, slots + pair).extend(I64, signed=True)
                with k.when(slot >= 0):
                    weight = spread(k, k.load(F32, weights + pair), kind)
                    total.set(k.fma(k.load(kind, rows + slot * rows_stride + at), weight, total.get()))
            k.store(total.get(), out + token * out_stride + at)

        each(k, columns, body)


_GATHER = TracedOperation("gather", _trace_gather)
_COMBINE = TracedOperation("combine", _trace_combine)
