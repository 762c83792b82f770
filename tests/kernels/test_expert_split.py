"""Experts shared out between a GPU's places and the CPU, against numpy."""

import numpy as np
import pytest

from cpu_kernels.expert_split import (
    HEADER,
    HostTables,
    LayerPlaces,
    SplitTables,
    split_row,
)
from cpu_kernels.isa import ISA
from cpu_kernels.matrix import Matrix
from cpu_kernels.pool import OperationError, Pool
from cpu_kernels.program import Program
from cpu_kernels.python_calls import PythonCall, PythonCalls
from cpu_kernels.router import NOT_FINITE, combine_row, gather_row
from tests.support.rows import ISA_NAMES, ISAS, address, close, floats

every_isa = pytest.mark.parametrize("isa", ISAS, ids=ISA_NAMES)


class Split:
    """The memory of one split of random pairs, and its run."""

    def __init__(self, tokens: int, experts: int, used: int, resident: list[int], *, brought: int = 100) -> None:
        rng = np.random.default_rng([tokens, experts, used])
        pairs, self.segments = tokens * used, min(tokens * used, experts)
        self.ids = np.stack([rng.permutation(experts)[:used] for _ in range(tokens)]).astype(np.int32)
        self.weights = rng.random((tokens, used), np.float32)
        self.resident = np.array(resident, np.int32)
        self.counts, self.where = np.full((2, experts), -7, np.int64), np.full(experts, -7, np.int32)
        sizes = (experts + 1, pairs, pairs)
        self.offsets, self.slot_of_pair, self.token_of_slot = (np.full(size, -7, np.int32) for size in sizes)
        self.layout = SplitTables(self.segments, pairs)
        self.tables = np.full(self.layout.length, -7, np.int32)
        self.shape, self.brought, self.program = (tokens, experts, used), brought, Program()

    def run(self, choose: PythonCall | None = None) -> None:
        tokens, experts, used = self.shape
        places = LayerPlaces(address(self.resident), address(self.counts), address(self.where), self.brought)
        host = HostTables(address(self.offsets), address(self.slot_of_pair), address(self.token_of_slot))
        self.program.add(
            split_row(
                *(address(self.ids), address(self.weights), tokens),
                used=used,
                experts=experts,
                places=places,
                host=host,
                tables=address(self.tables),
                segments=self.segments,
                status=self.program.status_address,
                choose=choose,
            )
        )
        with Pool(2) as pool:
            pool.run(self.program)

    def pairs_of(self, start: int) -> list[tuple[int, int, float]]:
        """(expert, token, weight) of the pairs in the segments from `start` on."""
        found = []
        entries = self.tables[start : start + 4 * self.segments].reshape(-1, 4)
        for place, first, count, expert in entries[entries[:, 2] > 0].tolist():
            assert self.where[expert] == place
            for pair in range(first, first + count):
                weight = self.tables[self.layout.weights + pair : self.layout.weights + pair + 1].view(np.float32)
                found.append((expert, int(self.tables[self.layout.tokens + pair]), float(weight[0])))
        return found


@every_isa
@pytest.mark.parametrize(("tokens", "experts", "used"), [(1, 64, 8), (37, 60, 4), (5, 3, 3), (2, 1, 1)])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_every_pair_goes_to_one_side(isa: ISA, tokens: int, experts: int, used: int, share: float) -> None:
    rng = np.random.default_rng(experts)
    places = rng.permutation(experts)
    split = Split(
        tokens, experts, used, np.where(rng.random(experts) < share, places, -1).tolist(), brought=experts // 2
    )
    split.run()
    expected = sorted(
        (expert, token, float(weight))
        for token, (ids, weights) in enumerate(zip(split.ids.tolist(), split.weights.tolist(), strict=True))
        for expert, weight in zip(ids, weights, strict=True)
        if split.resident[expert] >= 0
    )
    old, new = split.pairs_of(split.layout.resident), split.pairs_of(split.layout.brought)
    assert sorted(old + new) == expected
    assert old == sorted(old)
    assert new == sorted(new)
    assert all(split.resident[expert] < split.brought for expert, _, _ in old)
    assert all(split.resident[expert] >= split.brought for expert, _, _ in new)
    assert split.tables[0] == len(expected)
    assert split.tables[1] == len({expert for expert, _, _ in old})
    assert split.tables[2] == len({expert for expert, _, _ in new})
    assert (split.tables[split.layout.tokens + len(expected) : split.layout.weights] == 0).all()
    np.testing.assert_array_equal(split.counts[0], np.bincount(split.ids.reshape(-1), minlength=experts))

    left = tokens * used - len(expected)
    assert split.offsets[-1] == left
    assert (split.token_of_slot[left:] == -1).all()
    x, gathered, joined = floats(1, tokens, 50), floats(2, tokens * used, 50) * np.float32("nan"), floats(3, tokens, 50)
    program = Program()
    inputs = (Matrix.of(gathered), Matrix.of(x), address(split.token_of_slot), tokens * used)
    program.add(gather_row(*inputs, isa=isa))
    outputs = (Matrix.of(joined), Matrix.of(gathered), address(split.weights), address(split.slot_of_pair), tokens)
    program.add(combine_row(*outputs, used=used, isa=isa))
    with Pool(2) as pool:
        pool.run(program)
    for slot in range(left):
        expert = int(np.searchsorted(split.offsets, slot, "right")) - 1
        assert split.resident[expert] < 0
        assert expert in split.ids[split.token_of_slot[slot]]
    mine = np.where(split.resident[split.ids] < 0, split.weights, 0).sum(1, keepdims=True)
    close(joined, mine * x)


def test_a_call_may_change_where_experts_are() -> None:
    split = Split(6, 8, 2, [-1] * 8, brought=4)

    def choose() -> None:
        assert split.counts[0].sum() == 12
        split.where[2:5] = 4, 5, 1

    split.run(PythonCalls().callback(lambda _: choose(), split.program.status_address))
    assert {expert for expert, _, _ in split.pairs_of(split.layout.brought)} <= {2, 3}
    assert {expert for expert, _, _ in split.pairs_of(split.layout.resident)} <= {4}
    assert split.tables[0] == np.isin(split.ids, (2, 3, 4)).sum()


def test_what_a_call_raises_ends_the_run() -> None:
    split = Split(2, 4, 2, [-1] * 4)

    def choose() -> None:
        raise KeyError("no such thing")

    calls = PythonCalls()
    with pytest.raises(OperationError):
        split.run(calls.callback(lambda _: choose(), split.program.status_address))
    assert isinstance(calls.take_failure(), KeyError)
    assert calls.take_failure() is None
    assert split.tables[HEADER - 1] == -7


@pytest.mark.parametrize("wrong", ["nan", "low", "high"])
def test_what_no_router_decides_ends_the_run(wrong: str) -> None:
    split = Split(4, 6, 2, [-1] * 6)
    if wrong == "nan":
        split.weights[2, 1] = np.nan
    else:
        split.ids[3, 0] = -1 if wrong == "low" else 6
    with pytest.raises(OperationError) as error:
        split.run()
    assert error.value.code == NOT_FINITE
