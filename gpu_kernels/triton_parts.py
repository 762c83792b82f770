# ruff: noqa: N803  what kernels fix at compile time is upper case, and their language is a part of Python's
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, import-untyped"
"""Triton kernels that join what was attended in parts: by programs that share a context, or on two devices.

A part is the weighted values of what it has seen, divided by the sum of weights, with that sum. Parts are joined in a
fixed order. Knows nothing about models.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["splits", "tokens"])
def merge_splits_kernel(
    parts,
    sums,
    out,
    marks,
    splits,
    tokens,
    heads,
    out_stride,
    marks_stride,
    VALUE: tl.constexpr,
    E: tl.constexpr,
    S: tl.constexpr,
    HAS_MARKS: tl.constexpr,
):
    """out = the parts weighted by their shares of the whole sum, S at a time; with HAS_MARKS that sum goes to marks.

    Programs (tokens, heads).
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dim = tl.arange(0, E)
    greatest = -float("inf")
    total = 0.0
    mixed = tl.zeros((E,), tl.float32)
    for first in range(0, splits, S):
        split = first + tl.arange(0, S)
        place = (split * tokens + token) * heads + head
        sum_of = tl.load(sums + place, mask=split < splits, other=-float("inf"))
        peak = tl.maximum(greatest, tl.max(sum_of, axis=0))
        safe = tl.where(peak == -float("inf"), 0.0, peak)
        share = tl.exp(sum_of - safe)
        shrink = tl.exp(greatest - safe)
        total = total * shrink + tl.sum(share, axis=0)
        seen = (sum_of > -float("inf"))[:, None] & (dim < VALUE)[None, :]
        part = tl.load(parts + place[:, None] * VALUE + dim[None, :], mask=seen, other=0.0)
        mixed = mixed * shrink + tl.sum(part * share[:, None], axis=0)
        greatest = peak
    result = mixed / total
    tl.store(out + token * out_stride + head * VALUE + dim, result.to(out.dtype.element_ty), mask=dim < VALUE)
    if HAS_MARKS:
        tl.store(marks + token * marks_stride + head, greatest)
        tl.store(marks + token * marks_stride + heads + head, total)


@triton.jit
def join_parts_kernel(
    out, marks, part, heads, out_stride, marks_stride, part_stride, VALUE: tl.constexpr, E: tl.constexpr
):
    """See `Kernels.join_parts`. Programs (tokens, heads)."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dim = tl.arange(0, E)
    told = part + token * part_stride
    greatest = tl.load(marks + token * marks_stride + head)
    other_greatest = tl.load(told + heads * VALUE + head)
    peak = tl.maximum(greatest, other_greatest)
    mine = tl.load(marks + token * marks_stride + heads + head) * tl.exp(greatest - peak)
    other = tl.load(told + heads * VALUE + heads + head) * tl.exp(other_greatest - peak)
    place = out + token * out_stride + head * VALUE + dim
    held = tl.load(place, mask=dim < VALUE, other=0.0).to(tl.float32)
    added = tl.load(told + head * VALUE + dim, mask=dim < VALUE, other=0.0)
    joined = held * (mine / (mine + other)) + added * (other / (mine + other))
    tl.store(place, joined.to(out.dtype.element_ty), mask=dim < VALUE)
