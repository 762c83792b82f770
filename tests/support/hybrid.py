"""Runs a model file with the hybrid executor on a simulated GPU, and draws placements."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.typing import NDArray

from cpu_kernels.isa import current
from gpu_kernels.simulated import SimulatedDevice
from offload.errors import FlashError
from offload.expert_rates import ExpertRates
from offload.gguf import GGUFFile
from runtime.architectures import Model, describe
from runtime.executor import Step
from runtime.executor.base import Executor
from runtime.executor.hybrid import HybridExecutor, HybridPlacement
from runtime.streamed import GGUFBundles, StreamedWeights
from tests.support import models, programs
from tests.support.failing_reads import FailingReads

FAST_GPU = "sim:vram=2GiB,bw=10000GB/s,link=10000GB/s,tflops=1000,launch=0us,link_latency=0us"
IDS = models.prompt(length=40)
TOKENS = 12  # that `expected` chooses
BRINGING = ExpertRates(1e9, 1e9, 1e11, 1e12, 1e9)  # a slow CPU: bringing experts pays
BRINGING_FROM_FLASH = ExpertRates(1e9, 1e9, 1e11, 1e12, 1e9, read_bytes_per_s=1e10)


@contextmanager
def hybrid(
    path: Path, placement: HybridPlacement, *, gpu: str = FAST_GPU, stream_slots: int = 0, **options: Any
) -> Iterator[HybridExecutor]:
    """An executor, closed at the end; by default nearly all time is the CPU's own.

    `stream_slots`: of RAM, for what the CPU reads from the file when it is needed; 0: it has all.
    """
    with GGUFFile.open(path) as file:
        model, isa = describe(file), current()
        options = {"context_tokens": 64, **options}
        if stream_slots:
            source = GGUFBundles(file, model, isa)
            options["streamed"] = StreamedWeights(source, model, isa, slots=stream_slots)
        runner = HybridExecutor(model, file, placement, SimulatedDevice(gpu), **options)
        try:
            yield runner
        finally:
            runner.close()


def logits_after_failed_reads(runner: HybridExecutor, ids: Sequence[int]) -> NDArray[np.float32]:
    """Of every position, once the drive answers again; before, every read fails, and nothing is held of the pass."""
    kv = runner.new_kv(64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("offload.gguf_source.positional_read", FailingReads(1, 10**6))
        with pytest.raises(FlashError):
            runner.forward([Step(ids, kv)])
    assert kv.length == 0
    return runner.forward([Step(ids, kv)], logits="all")[0]


def model_of(path: Path) -> Model:
    """The description of a file's model."""
    with GGUFFile.open(path) as file:
        return describe(file)


def all_logits(runner: Executor, ids: Sequence[int], capacity_tokens: int = 128) -> NDArray[np.float32]:
    """Of every position."""
    return runner.forward([Step(ids, runner.new_kv(capacity_tokens))], logits="all")[0]


def greedy(runner: Executor, ids: Sequence[int], count: int) -> tuple[list[int], NDArray[np.float32]]:
    """The most probable next tokens, and the logits each was chosen from, (count, vocab)."""
    kv = runner.new_kv(len(ids) + count)
    rows = [runner.forward([Step(ids, kv)])[0][-1]]
    while len(rows) < count:
        rows.append(runner.forward([Step([int(rows[-1].argmax())], kv)])[0][-1])
    return [int(row.argmax()) for row in rows], np.stack(rows)


def continued(runner: Executor, ids: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float32]:
    """The logits that each of `tokens` would be chosen from, (tokens, vocab)."""
    kv = runner.new_kv(len(ids) + len(tokens))
    steps = [ids, *([token] for token in tokens[:-1])]
    return np.stack([runner.forward([Step(step, kv)])[0][-1] for step in steps])


@cache
def expected(path: Path) -> tuple[list[int], np.ndarray]:
    """What the CPU alone chooses, and the logits that it chooses from."""
    with programs.executor(path) as runner:
        return greedy(runner, IDS, TOKENS)


@st.composite
def placements(draw: st.DrawFn, model: Model) -> HybridPlacement:
    """Any placement of a model, with experts on either side of everything."""
    layers = range(model.block_count)
    attention, feed_forward = (draw(st.frozensets(st.sampled_from(layers))) for _ in range(2))
    ram_kv: frozenset[int] = frozenset()
    if attention and draw(st.booleans()):
        ram_kv = draw(st.frozensets(st.sampled_from(sorted(attention))))
    routed = sorted(layer for layer in feed_forward if model.layers[layer].ffn_gate_inp is not None)
    options: dict[str, Any] = {}
    if routed:
        count = model.expert_count
        resident: frozenset[int] = frozenset()
        if draw(st.booleans()):
            resident = draw(st.frozensets(st.sampled_from(routed)))
        experts = st.tuples(st.sampled_from(routed), st.integers(0, count - 1))
        options = {
            "resident": resident,
            "expert_slots": len(resident) * count + draw(st.integers(0, 2 * count)),
            "seeds": tuple(draw(st.lists(experts, max_size=2 * count, unique=True))),
            "brought_slots": draw(st.sampled_from([0, 1, count])),
        }
    return HybridPlacement(attention, feed_forward, output=draw(st.booleans()), ram_kv=ram_kv, **options)
