"""Reading a part of the KV cache: what is read whole stays to the bit, and what a token reads depends on it alone."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cpu_kernels.kv_policy import KVPolicy
from cpu_kernels.kv_types import KVType
from offload.kv_chunks import ChunkStore
from offload.kv_spill import SpillFile
from runtime.executor import Step
from runtime.executor.program import ProgramExecutor, ProgramKV
from runtime.executor.program.kv_tiers import KVTiers
from tests.support import models, programs
from tests.support.command import strata

TOKENS = 1300
IDS = models.prompt(length=TOKENS + 64)
BUDGET = 256
TYPES = [(KVType.F16, KVType.F16), (KVType.KIVI4, KVType.Q8_0)]
Logits = NDArray[np.float32]


@pytest.fixture(scope="module")
def executor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProgramExecutor]:
    spec = replace(models.spec_of("llama"), blocks=4)
    path = models.write_model(tmp_path_factory.mktemp("model") / "model.gguf", spec, "Q8_0")
    with programs.executor(path, threads=2) as made:
        yield made


@pytest.fixture
def run(capsys, monkeypatch):
    return lambda *arguments: strata(capsys, monkeypatch, *arguments)


def filled(executor: ProgramExecutor, policy: KVPolicy, tokens: int = TOKENS) -> ProgramKV:
    kv = executor.new_kv(TOKENS + 64, policy)
    executor.forward([Step(IDS[:tokens], kv)], logits="none")
    return kv


def decoded(executor: ProgramExecutor, kv: ProgramKV, count: int = 3) -> Logits:
    """Logits of tokens one by one."""
    return np.concatenate([executor.forward([Step([IDS[kv.length]], kv)])[0] for _ in range(count)])


def verified(executor: ProgramExecutor, kv: ProgramKV, count: int = 3) -> Logits:
    """Of tokens together."""
    return executor.forward([Step(IDS[kv.length : kv.length + count], kv)], logits="all")[0]


def budgeted(types: tuple[KVType, KVType], budget: int = BUDGET) -> KVPolicy:
    return KVPolicy(*types, budget_tokens=budget)


@pytest.mark.parametrize("types", TYPES)
def test_a_budget_for_all_tokens_changes_no_bit(executor: ProgramExecutor, types: tuple[KVType, KVType]) -> None:
    plain, kv = filled(executor, KVPolicy(*types)), filled(executor, budgeted(types, 1408))
    assert (decoded(executor, kv) == decoded(executor, plain)).all()
    assert (verified(executor, kv, 5) == verified(executor, plain, 5)).all()
    assert (verified(executor, kv, 30) == verified(executor, plain, 30)).all()
    assert kv.abstracts is not None
    assert kv.abstracts.counts.read_blocks == kv.abstracts.counts.blocks > 0


@pytest.mark.parametrize("types", TYPES)
def test_a_token_reads_the_same_alone_and_with_others(executor: ProgramExecutor, types: tuple[KVType, KVType]) -> None:
    kv = filled(executor, budgeted(types))
    alone = decoded(executor, kv, 40)
    for count in (2, 5, 40):
        other = filled(executor, budgeted(types))
        assert (verified(executor, other, count) == alone[:count]).all()
    caches = [filled(executor, budgeted(types)) for _ in range(3)]
    for rows in executor.forward([Step([IDS[TOKENS]], cache) for cache in caches]):
        assert (rows == alone[:1]).all()
    dense = decoded(executor, filled(executor, KVPolicy(*types)), 40)
    assert (dense != alone).any(axis=1).all()


def test_prompts_are_read_whole(executor: ProgramExecutor) -> None:
    plain, kv = executor.new_kv(TOKENS), executor.new_kv(TOKENS, budgeted(TYPES[0]))
    for cut in (1000, 257, 2):  # the last chunk of one has a token alone
        rows = [executor.forward([Step(IDS[each.length : each.length + cut], each)])[0] for each in (plain, kv)]
        assert (rows[0] == rows[1]).all()


@pytest.mark.parametrize("types", TYPES)
def test_what_is_cut_and_brought_back_is_read_alike(executor: ProgramExecutor, types: tuple[KVType, KVType]) -> None:
    whole = filled(executor, budgeted(types), 1280)
    expected = decoded(executor, whole, 80)
    whole.truncate(whole.cut_at(1281) if types[0] is KVType.F16 else 1280)
    again = decoded(executor, whole, 79 if whole.length == 1281 else 80)
    assert (again == expected[-len(again) :]).all()
    whole.truncate(whole.cut_at(1280))
    saved, size = executor.new_kv(TOKENS + 64, whole.policy), whole.rows_layout.block_bytes
    for block in reversed(range(20)):
        rows = np.empty(size, np.uint8)
        whole.export_block(block, rows)
        saved.import_block(block, rows)
    saved.restored(1280)
    assert (decoded(executor, saved, 80) == expected).all()
    shared = executor.new_kv(2 * TOKENS, whole.policy)
    assert shared.share(filled(executor, whole.policy, 1280), 1280) == 1280
    assert (decoded(executor, shared, 80) == expected).all()


def test_rows_under_a_budget_are_not_taken_for_others(executor: ProgramExecutor) -> None:
    names = [executor.new_kv(64, policy).rows_layout.name for policy in (KVPolicy(), budgeted(TYPES[0]))]
    assert names[0] != names[1]


def test_what_was_chosen_is_counted(executor: ProgramExecutor) -> None:
    kv = filled(executor, budgeted(TYPES[0]))
    decoded(executor, kv, 1)
    assert kv.abstracts is not None
    counts = kv.abstracts.counts
    blocks, heads = -(-(TOKENS + 1) // 64), 2 * 2  # of the layers behind the first two
    assert counts.blocks == heads * blocks
    assert counts.read_blocks <= heads * 2 * BUDGET // 64
    assert counts.leaves == heads * 4 * (blocks - 2)
    assert counts.bounds > 0


def test_windows_are_read_whole(tmp_path: Path) -> None:
    spec = replace(models.spec_of("gemma3"), blocks=8)
    path = models.write_model(tmp_path / "model.gguf", spec, "Q8_0")
    with programs.executor(path) as executor:
        kv = filled(executor, budgeted(TYPES[0]), 700)
        windows = sum(layer.sliding_window is not None for layer in executor.model.layers[2:])
        assert 0 < windows < 6
        decoded(executor, kv, 1)
        assert kv.abstracts is not None
        assert kv.abstracts.counts.blocks == (6 - windows) * executor.model.head_count_kv * 11


def test_the_command_takes_a_budget(run, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Once upon a time there was a cat. " * 40, "utf-8")
    options = ["-m", "demo", "-f", str(prompt), "--raw", "--temp", "0", "-n", "3", "-t", "2", "-q"]
    dense = run("run", *options)
    assert dense.code == 0
    assert run("run", *options, "--kv-budget", "512").stdout == dense.stdout
    part = run("run", *options[:-1], "--kv-budget", "256")
    assert part.code == 0
    assert "answers can differ" in " ".join(part.stderr.split())
    refused = run("run", *options, "--kv-budget", "256", "--loop", "sequential")
    assert refused.code == 1
    assert "reads all of the KV cache" in refused.stderr
    assert run("run", *options, "--kv-budget", "100").code == 2
    assert "Can change answers" in " ".join(run("run", "--help").stdout.replace("│", " ").split())


@pytest.mark.parametrize("most_bytes", [None, 1 << 30])  # without a cache, and with one
@pytest.mark.parametrize("types", TYPES)
def test_only_what_is_chosen_is_read_from_flash(
    tmp_path: Path, types: tuple[KVType, KVType], most_bytes: int | None
) -> None:
    spec = replace(models.spec_of("llama"), blocks=4)
    path = models.write_model(tmp_path / "model.gguf", spec, "Q8_0")
    spill = SpillFile(tmp_path, 1 << 20, in_parts=True)
    tiers = KVTiers(ChunkStore(spill), most_bytes)
    assert spill.pairs is not None
    with programs.executor(path, threads=2, kv_policy=budgeted(types), kv_tiers=tiers) as executor:
        warm, kv = filled(executor, budgeted(types)), filled(executor, budgeted(types))
        for piece in range(2):
            kv.evict(piece)
        expected = [decoded(executor, warm, 2), verified(executor, warm, 5), verified(executor, warm, 40)]
        before = spill.pairs.num_bytes
        found = [decoded(executor, kv, 2)]
        read, dense = spill.pairs.num_bytes - before, 2 * sum(chunk.num_bytes for chunk in kv.chunks(2)[:2])
        found += [verified(executor, kv, 5), verified(executor, kv, 40)]
        for rows, wanted in zip(found, expected, strict=True):
            assert (rows == wanted).all()
        if types[0] is KVType.F16:  # whose blocks are whole pages
            assert 0 < read < 0.75 * 2 * dense
