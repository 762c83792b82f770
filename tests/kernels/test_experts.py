"""Products of stacked matrices with the tokens that chose them: the bits of single products, segment after segment."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_kernels.activations import ActivationBuffer
from cpu_kernels.experts import (
    expert_matmul_row,
    most_columns,
    most_segments,
    quantize_slots_row,
    scale_slots_row,
    segments_row,
)
from cpu_kernels.isa import ISA, current
from cpu_kernels.matrix import Matrix
from cpu_kernels.memory import aligned_bytes
from cpu_kernels.pool import Pool
from cpu_kernels.program import Program, Row
from cpu_kernels.router import group_row
from tests.support.kernel_products import Case
from tests.support.rows import ISA_NAMES, ISAS, THREADS, address, close, floats, run

every_isa = pytest.mark.parametrize("isa", ISAS, ids=ISA_NAMES)


@dataclass(frozen=True)
class Routed:
    """Which experts (tokens, used) chose, the table of segments made from it, and the expert of every slot."""

    topk_ids: np.ndarray
    experts: int
    tile_columns: int
    segments: np.ndarray
    expert_of_slot: np.ndarray

    @property
    def slots(self) -> int:
        """Pairs of a token and an expert."""
        return self.topk_ids.size


def routed(seed: int, tokens: int, used: int, experts: int, tile_columns: int = 8) -> Routed:
    """A random choice."""
    rng = np.random.default_rng(seed)
    ids = np.array([rng.permutation(experts)[:used] for _ in range(tokens)], np.int32)
    offsets, slot_of_pair, token_of_slot = (
        np.full(count, -1, np.int32) for count in (experts + 1, tokens * used, tokens * used)
    )
    segments = np.full((most_segments(tokens, used, experts), 4), 99, np.int32)
    run(
        group_row(
            *(address(ids), tokens),
            used=used,
            experts=experts,
            offsets=address(offsets),
            slot_of_pair=address(slot_of_pair),
            token_of_slot=address(token_of_slot),
        ),
        segments_row(address(offsets), address(segments), len(segments), experts=experts, tile_columns=tile_columns),
    )
    return Routed(ids, experts, tile_columns, segments, np.sort(ids.reshape(-1), kind="stable"))


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 60),
    experts=st.integers(1, 12),
    used=st.integers(1, 12),
    tile_columns=st.sampled_from([4, 8]),
    seed=st.integers(0, 99),
)
def test_segments_hold_every_slot_once(tokens: int, experts: int, used: int, tile_columns: int, seed: int) -> None:
    choice = routed(seed, tokens, min(used, experts), experts, tile_columns)
    counts = np.bincount(choice.expert_of_slot, minlength=experts)
    active = choice.segments[choice.segments[:, 2] > 0]
    assert active[:, 0].tolist() == np.flatnonzero(counts).tolist()
    assert active[:, 2].tolist() == counts[counts > 0].tolist()
    assert active[:, 1].tolist() == np.cumsum([0, *active[:-1, 2]]).tolist()
    assert (choice.segments[len(active) :, 2] == 0).all()
    column = 0
    for _, _, count, first in active.tolist():
        assert first == column
        rest = count % tile_columns
        column += count - rest + (1 << (rest - 1).bit_length() if rest else 0)
    assert column <= most_columns(tokens, choice.topk_ids.shape[1], experts, tile_columns)


def stacked(name: str, isa: ISA, experts: int, rows: int, columns: int) -> tuple[list[Case], np.ndarray, int]:
    """(matrices, their panels one after the other with a gap, bytes from one to the next)."""
    rng = np.random.default_rng(5)
    cases = [Case.random(name, isa, rows, columns, rng) for _ in range(experts)]
    expert_bytes = cases[0].panels.nbytes + 128
    panels = aligned_bytes(experts * expert_bytes)
    for expert, case in enumerate(cases):
        panels[expert * expert_bytes :][: case.panels.nbytes] = case.panels
    return cases, panels, expert_bytes


def product_rows(
    case: Case, panels: np.ndarray, expert_bytes: int, *, x: np.ndarray, out: np.ndarray, choice: Routed
) -> tuple[Row, Row]:
    tokens, used = choice.topk_ids.shape
    columns = most_columns(tokens, used, choice.experts, choice.tile_columns)
    form = case.form
    buffer = ActivationBuffer.allocate(form.activation_kind, case.columns, columns, form.isa)
    table = address(choice.segments)
    return (
        quantize_slots_row(Matrix.of(x), table, len(choice.segments), buffer),
        expert_matmul_row(
            *(form, address(panels), expert_bytes, case.rows, buffer),
            out=Matrix.of(out),
            segments=table,
            most=len(choice.segments),
        ),
    )


@every_isa
@pytest.mark.parametrize("name", ["F32", "Q8_0", "Q4_K"])
@pytest.mark.parametrize(("tokens", "used", "experts"), [(1, 3, 5), (23, 2, 4), (2, 4, 4), (300, 1, 2)])
def test_every_slot_is_the_product_with_its_experts_matrix(
    isa: ISA, name: str, tokens: int, used: int, experts: int
) -> None:
    rows, columns = 37, 256
    cases, panels, expert_bytes = stacked(name, isa, experts, rows, columns)
    choice = routed(tokens, tokens, used, experts)
    x = floats(1, choice.slots, columns)
    expected = np.empty((choice.slots, rows), np.float32)
    for expert in set(choice.expert_of_slot.tolist()):
        chosen = choice.expert_of_slot == expert
        expected[chosen] = cases[expert].multiply(np.ascontiguousarray(x[chosen]))
    block = np.full((choice.slots + 1, rows + 3), np.nan, np.float32)
    out = block[:-1, :rows]
    program = Program(product_rows(cases[0], panels, expert_bytes, x=x, out=out, choice=choice))
    for threads in THREADS:
        block[:] = np.nan
        with Pool(threads) as pool:
            pool.run(program)
        np.testing.assert_array_equal(out, expected)
        assert np.isnan(block[-1]).all()
        assert np.isnan(block[:, rows:]).all()
    wrong = product_rows(cases[0], panels, expert_bytes - 64, x=x, out=out, choice=choice)
    run(*wrong)
    assert not np.array_equal(out, expected)


@every_isa
def test_scales_of_experts(isa: ISA) -> None:
    choice = routed(3, 11, 3, 5)
    x, scales = floats(0, choice.slots, 45), floats(1, 5)
    expected = x * scales[choice.expert_of_slot][:, None]
    run(
        scale_slots_row(Matrix.of(x), address(scales), address(choice.segments), len(choice.segments), isa=isa),
        threads=2,
    )
    assert close(x, expected, 1e-7)


def test_matrices_that_do_not_fit() -> None:
    case = Case.random("Q8_0", current(), 16, 64, np.random.default_rng(1))
    buffer = case.form.activations(64, 8)
    out = Matrix.of(np.zeros((4, 17), np.float32))
    with pytest.raises(ValueError, match="17 columns for products with 16 rows"):
        expert_matmul_row(case.form, address(case.panels), 0, 16, buffer, out=out, segments=0, most=1)
    with pytest.raises(ValueError, match="cannot be multiplied"):
        narrow = Case.random("F32", current(), 16, 64, np.random.default_rng(1)).form
        fitting = Matrix.of(np.zeros((4, 16), np.float32))
        expert_matmul_row(narrow, address(case.panels), 0, 16, buffer, out=fitting, segments=0, most=1)
