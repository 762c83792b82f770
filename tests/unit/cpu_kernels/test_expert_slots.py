"""Experts in slots: looked up, ordered by arrival, waited for; products are those of experts that lie in memory."""

import threading
import time

import numpy as np
import pytest

from cpu_kernels.activations import ActivationBuffer
from cpu_kernels.expert_slots import ExpertSlots
from cpu_kernels.experts import (
    Streamed,
    expert_matmul_row,
    most_columns,
    most_segments,
    quantize_slots_row,
    segments_row,
    streamed_matmul_row,
)
from cpu_kernels.isa import ISA
from cpu_kernels.matrix import Matrix
from cpu_kernels.memory import aligned_bytes
from cpu_kernels.pool import OperationError, Pool
from cpu_kernels.program import Program
from cpu_kernels.router import group_row
from tests.support.kernel_products import Case
from tests.support.rows import ISA_NAMES, ISAS, address, floats

EXPERTS, USED, TOKENS, ROWS, COLUMNS = 6, 3, 4, 48, 64


class Layer:
    """A layer's matrices, a router's choice, and the program that multiplies, with experts in slots or not."""

    def __init__(self, isa: ISA, *, threads: int = 1) -> None:
        rng = np.random.default_rng(7)
        self.cases = [Case.random("Q4_0", isa, ROWS, COLUMNS, rng) for _ in range(EXPERTS)]
        self.form = self.cases[0].form
        self.expert_bytes = -(-self.cases[0].panels.nbytes // 4096) * 4096
        self.topk_ids = np.array([rng.permutation(EXPERTS - 1)[:USED] for _ in range(TOKENS)], np.int32)
        self.used = sorted(set(self.topk_ids.reshape(-1).tolist()))
        self.x = floats(3, TOKENS * USED, COLUMNS)
        self.slots = ExpertSlots(2, EXPERTS, 2, slots=4 + EXPERTS, slot_bytes=self.expert_bytes)
        self.memory = aligned_bytes(self.slots.slots * self.expert_bytes)
        self.misses: list[tuple[int, list[int], int]] = []
        self.threads = threads
        self._tables = [np.zeros(count, np.int32) for count in (EXPERTS + 1, TOKENS * USED, TOKENS * USED)]
        self.segments = np.zeros((most_segments(TOKENS, USED, EXPERTS), 4), np.int32)

    def put(self, expert: int, slot: int) -> None:
        """The bytes of an expert into a slot."""
        panels = self.cases[expert].panels
        self.memory[slot * self.expert_bytes :][: panels.nbytes] = panels

    def arrive(self, expert: int, slot: int) -> None:
        """The expert is there, all of it."""
        self.slots.assign(1, expert, slot)
        self.put(expert, slot)
        for part in range(2):
            self.slots.landed(slot, part)

    def run(self, miss: object = None, *, dense_from: int = EXPERTS + 1) -> np.ndarray:
        """(pairs, rows): the products of all slots; without `miss`, of experts that all lie in memory."""
        offsets, slot_of_pair, token_of_slot = (address(table) for table in self._tables)
        out = np.zeros((TOKENS * USED, ROWS), np.float32)
        columns = most_columns(TOKENS, USED, EXPERTS, self.form.isa.tile_columns)
        buffer = ActivationBuffer.allocate(self.form.activation_kind, COLUMNS, columns, self.form.isa)
        table, most = address(self.segments), len(self.segments)
        program = Program()
        program.add(
            group_row(
                *(address(self.topk_ids), TOKENS),
                used=USED,
                experts=EXPERTS,
                offsets=offsets,
                slot_of_pair=slot_of_pair,
                token_of_slot=token_of_slot,
            )
        )
        program.add(segments_row(offsets, table, most, experts=EXPERTS, tile_columns=self.form.isa.tile_columns))
        place = {"out": Matrix.of(out), "segments": table, "most": most}
        if miss is None:
            whole = aligned_bytes(EXPERTS * self.expert_bytes)
            for expert, case in enumerate(self.cases):
                whole[expert * self.expert_bytes :][: case.panels.nbytes] = case.panels
            program.add(quantize_slots_row(Matrix.of(self.x), table, most, buffer))
            program.add(expert_matmul_row(self.form, address(whole), self.expert_bytes, ROWS, buffer, **place))
        else:
            status = program.status_address
            program.add(self.slots.lookup_row(1, table, most, dense_from=dense_from, status=status, miss=miss))
            program.add(quantize_slots_row(Matrix.of(self.x), table, most, buffer))
            streamed = Streamed(self.slots, 1, 1, status)
            program.add(streamed_matmul_row(self.form, address(self.memory), streamed, ROWS, buffer, **place))
        with Pool(self.threads) as pool:
            pool.run(program)
        return out

    def note(self, layer: int, experts: np.ndarray, used: int) -> None:
        """A miss whose experts arrive at once."""
        self.misses.append((layer, experts.tolist(), used))
        for expert in experts.tolist():
            self.arrive(expert, 9 - expert)


@pytest.mark.parametrize("isa", ISAS, ids=ISA_NAMES)
def test_products_are_those_of_experts_in_memory(isa: ISA) -> None:
    layer = Layer(isa)
    assert np.array_equal(layer.run(layer.note), layer.run())
    assert layer.misses == [(1, layer.used, len(layer.used))]
    again = layer.run(layer.note)
    assert np.array_equal(again, layer.run())
    assert len(layer.misses) == 1, "what is there is not asked for again"


def test_use_is_counted() -> None:
    layer = Layer(ISAS[0])
    layer.run(layer.note)
    counts = np.bincount(layer.topk_ids.reshape(-1), minlength=EXPERTS)
    assert layer.slots.counts[1].tolist() == counts.tolist()
    assert (layer.slots.last_used[1] > 0).tolist() == (counts > 0).tolist()
    assert not layer.slots.counts[0].any()
    assert layer.slots.lookups == len(layer.used)


def test_dense_use_is_told_without_misses() -> None:
    layer = Layer(ISAS[0])
    layer.run(layer.note)
    layer.run(layer.note, dense_from=len(layer.used))
    assert layer.misses[1:] == [(1, [], len(layer.used))]


@pytest.mark.parametrize("threads", [1, 2])
def test_late_experts_come_last_and_are_waited_for(threads: int) -> None:
    layer = Layer(ISAS[0], threads=threads)
    late, early = layer.used[0], layer.used[1:]
    for expert in early:
        layer.arrive(expert, expert)

    def bring() -> None:
        time.sleep(0.05)
        layer.put(late, 8)
        layer.slots.landed(8, 1)

    def miss(_layer: int, experts: np.ndarray, _used: int) -> None:
        assert experts.tolist() == [late]
        layer.slots.assign(1, late, 8)
        threading.Thread(target=bring).start()

    assert np.array_equal(layer.run(miss), layer.run())
    # sorted again by `segments_row` of the second run, so look at the order of a third
    layer.slots.assign(1, late, 8)
    seen: list[list[int]] = []
    layer.slots.landed(8, 1)
    layer.run(lambda *_: seen.append(layer.segments[:, 0].tolist()), dense_from=1)
    assert seen, "told of dense use"
    assert layer.segments[: len(layer.used), 0].tolist() == [*early, late]


def test_released_experts_are_asked_for_again() -> None:
    layer = Layer(ISAS[0])
    layer.run(layer.note)
    layer.slots.release(1, layer.used[0])
    assert np.array_equal(layer.run(layer.note), layer.run())
    assert layer.misses[1][1] == layer.used[:1]


def test_a_part_that_fails_ends_the_run() -> None:
    layer = Layer(ISAS[0])

    def miss(_layer: int, experts: np.ndarray, _used: int) -> None:
        for slot, expert in enumerate(experts.tolist()):
            layer.slots.assign(1, expert, slot)
            layer.slots.failed(slot, 1, 7)

    with pytest.raises(OperationError, match="failed with code 7"):
        layer.run(miss)
    for slot, expert in enumerate(layer.used):
        layer.slots.release(1, expert)
        layer.slots.forget_failure(slot, 1)
    assert np.array_equal(layer.run(layer.note), layer.run())


def test_what_a_miss_raises_is_kept() -> None:
    layer = Layer(ISAS[0])

    def miss(*_: object) -> None:
        raise KeyError("no such expert")

    with pytest.raises(OperationError):
        layer.run(miss)
    assert isinstance(layer.slots.take_failure(), KeyError)
    assert layer.slots.take_failure() is None
