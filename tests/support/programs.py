"""Runs a model file with the program executor."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.isa import ISA, current
from cpu_kernels.kv_policy import KVPolicy
from offload.flash import DEADLINE_S, ReadMode
from offload.gguf import GGUFFile
from offload.policies import PolicyName
from offload.prefetch_gate import PrefetchMode
from runtime.architectures import describe
from runtime.executor import Step
from runtime.executor.program import ProgramExecutor
from runtime.executor.program.executor import CHUNK_TOKENS
from runtime.executor.program.kv_tiers import KVTiers
from runtime.panels import PanelWeights
from runtime.streamed import GGUFBundles, StreamedWeights


@contextmanager
def executor(
    path: Path,
    *,
    threads: int = 1,
    isa: ISA | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    kv_policy: KVPolicy | None = None,
    kv_tiers: KVTiers | None = None,
) -> Iterator[ProgramExecutor]:
    """An executor, closed at the end."""
    with GGUFFile.open(path) as file:
        model = describe(file)
        weights = PanelWeights(file, model, isa=isa, threads=threads)
        weights.load()
    options = {"threads": threads, "chunk_tokens": chunk_tokens}
    runner = ProgramExecutor(model, weights, **options, kv_policy=kv_policy, kv_tiers=kv_tiers)
    try:
        yield runner
    finally:
        runner.close()


@contextmanager
def streaming(
    path: Path,
    slots: int,
    *,
    threads: int = 1,
    policy: PolicyName = PolicyName.LEAST_STALE,
    prefetch: PrefetchMode = PrefetchMode.AUTO,
    mode: ReadMode = ReadMode.DIRECT,
    chunk_tokens: int = CHUNK_TOKENS,
    deadline_s: float = DEADLINE_S,
    kv_tiers: KVTiers | None = None,
) -> Iterator[tuple[ProgramExecutor, StreamedWeights]]:
    """An executor whose experts, or layers, share that many slots, closed at the end."""
    with GGUFFile.open(path) as file:
        model, isa = describe(file), current()
        source = GGUFBundles(file, model, isa)
        options = {"policy": policy, "prefetch": prefetch, "mode": mode, "deadline_s": deadline_s}
        streamed = StreamedWeights(source, model, isa, slots=slots, **options)
        weights = PanelWeights(file, model, isa=isa, threads=threads, streamed=streamed)
        weights.load()
        runner = ProgramExecutor(model, weights, threads=threads, chunk_tokens=chunk_tokens, kv_tiers=kv_tiers)
        try:
            yield runner, streamed
        finally:
            runner.close()


def logits_of(
    path: Path,
    ids: Sequence[int],
    *,
    capacity_tokens: int = 128,
    threads: int = 1,
    isa: ISA | None = None,
) -> NDArray[np.float32]:
    """Logits of every position, (tokens, vocab)."""
    with executor(path, threads=threads, isa=isa) as runner:
        return runner.forward([Step(ids, runner.new_kv(capacity_tokens))], logits="all")[0]


def greedy(path: Path, ids: Sequence[int], count: int, *, threads: int = 1) -> tuple[list[int], NDArray[np.float32]]:
    """The most probable next tokens, and the logits each was chosen from, (count, vocab)."""
    with executor(path, threads=threads) as runner:
        kv = runner.new_kv(len(ids) + count)
        rows = [runner.forward([Step(ids, kv)])[0][-1]]
        while len(rows) < count:
            rows.append(runner.forward([Step([int(rows[-1].argmax())], kv)])[0][-1])
        return [int(row.argmax()) for row in rows], np.stack(rows)
