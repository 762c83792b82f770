"""Passes of several lanes: trees of drafts and few tokens of several sequences give plain decoding's bits."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_kernels.kv_policy import KVPolicy
from cpu_kernels.kv_types import KVType
from runtime.executor import Step
from runtime.executor.program import ProgramExecutor
from runtime.executor.program.lanes import lanes_of
from tests.support import models, programs
from tests.support.models import generated

NAMES = ("llama", "qwen3moe", "gemma3")
IDS = (models.prompt(length=50) * 4)[:170]
WINDOWED = KVPolicy(KVType.KIVI2, KVType.KIVI4, keeps_edges=False)


def parents_of(ups: list[int]) -> list[int]:
    """A root, and for each of `ups` a node below the ancestor of the last one that lies so many steps up."""
    parents = [-1]
    for place, up in enumerate(ups):
        parent = place
        for _ in range(up):
            parent = parents[parent] if parents[parent] >= 0 else parent
        parents.append(parent)
    return parents


trees = st.lists(st.integers(0, 3), max_size=9).map(parents_of)
"""Parents of a tree's nodes: each goes up so many steps from the node before."""


def way_to(parents: list[int], node: int) -> list[int]:
    way: list[int] = []
    while node >= 0:
        way.append(node)
        node = parents[node]
    return way[::-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def plain_row(runner: ProgramExecutor, ids: list[int]) -> np.ndarray:
    """The logits behind `ids`, whose last tokens are decoded one by one."""
    kv = runner.new_kv(200)
    runner.forward([Step(ids[:-3], kv)], logits="none")
    for token_id in ids[-3:]:
        row = runner.forward([Step([token_id], kv)])[0]
    return row[0]


@pytest.mark.parametrize("before", [20, 61, 126])
@pytest.mark.parametrize(
    ("name", "policy"), [*((name, None) for name in NAMES), ("llama", WINDOWED)], ids=[*NAMES, "llama-kivi"]
)
def test_every_node_of_a_tree_has_the_logits_of_plain_decoding(
    name: str, policy: KVPolicy | None, before: int, folder: Path
) -> None:
    with programs.executor(generated(folder, name), threads=2, kv_policy=policy) as runner:

        @settings(max_examples=4, deadline=None, derandomize=True)
        @given(parents=trees)
        def check(parents: list[int]) -> None:
            kv = runner.new_kv(200)
            runner.forward([Step(IDS[:before], kv)], logits="none")
            token_ids = [IDS[(7 * node) % len(IDS)] + 1 for node in range(len(parents))]
            rows = runner.forward([Step(token_ids, kv, parents)], logits="all")[0]
            for node in range(len(parents)):
                ids = [*IDS[:before], *(token_ids[place] for place in way_to(parents, node))]
                np.testing.assert_array_equal(rows[node], plain_row(runner, ids))
            way = way_to(parents, len(parents) - 1)
            assert kv.length == before + len(way)
            kept = [*IDS[:before], *(token_ids[place] for place in way)]
            after = runner.forward([Step([9], kv)])[0][0]
            np.testing.assert_array_equal(after, plain_row(runner, [*kept, 9]))

        check()


@pytest.mark.parametrize("name", NAMES)
def test_few_tokens_of_several_sequences_are_one_pass_and_the_same_bits(name: str, folder: Path) -> None:
    with programs.executor(generated(folder, name), threads=2) as runner:
        runs: list[int] = []
        compute = runner._compute
        runner._compute = lambda lanes, wanted: runs.append(len(lanes)) or compute(lanes, wanted)
        starts, counts = (5, 40, 63, 130), (1, 4, 9, 2)
        caches = [runner.new_kv(200) for _ in starts]
        for start, kv in zip(starts, caches, strict=True):
            runner.forward([Step(IDS[:start], kv)], logits="none")
        runs.clear()
        steps = [Step(IDS[kv.length : kv.length + count], kv) for kv, count in zip(caches, counts, strict=True)]
        rows = runner.forward(steps, logits="all")
        assert len(runs) == 1
        for start, count, row, kv in zip(starts, counts, rows, caches, strict=True):
            assert kv.length == start + count
            for place in range(count):
                np.testing.assert_array_equal(row[place], plain_row(runner, IDS[: start + place + 1]))


def test_angles_that_grow_in_the_middle_of_a_pass_hold_for_all_lanes(folder: Path) -> None:
    ids = [IDS[place % len(IDS)] for place in range(300)]
    with programs.executor(generated(folder, "llama")) as runner:
        caches = [runner.new_kv(400), runner.new_kv(400)]
        runner.forward([Step(ids[:20], caches[0])], logits="none")
        runner.forward([Step(ids[:256], caches[1])], logits="none")  # the table's first size
        rows = runner.forward([Step([ids[20]], caches[0]), Step([ids[256]], caches[1])])
        alone = runner.new_kv(400)
        runner.forward([Step(ids[:20], alone)], logits="none")
        np.testing.assert_array_equal(rows[0], runner.forward([Step([ids[20]], alone)])[0])


def test_a_tree_is_cut_into_runs_and_those_into_tiles(folder: Path) -> None:
    with programs.executor(generated(folder, "llama")) as runner:
        kv = runner.new_kv(60)
        lanes = lanes_of(Step(list(range(8)), kv, [-1, 0, 1, 2, 1, 4, 0, 6]), kv, 3)
        assert [(list(lane.token_ids), lane.start) for lane in lanes] == [
            ([0, 1, 2], 0), ([3], 3), ([4, 5], 2), ([6, 7], 1)
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("tokens", "parents", "message"),
    [
        ([1, 2, 3], [-1, 0], "2 parents of 3 tokens"),
        ([1, 2, 3, 4], [-1, 0, 0, 1], "whose branch is over"),
        ([1] * 65, list(range(-1, 64)), "a pass takes 64"),
    ],
)
def test_trees_that_are_none_are_refused(tokens: list[int], parents: list[int], message: str, folder: Path) -> None:
    with programs.executor(generated(folder, "llama")) as runner:
        kv = runner.new_kv(100)
        with pytest.raises(ValueError, match=message):
            runner.forward([Step(tokens, kv, parents)], logits="all")
        assert kv.length == 0
