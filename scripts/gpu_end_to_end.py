"""Whole models on a GPU with little memory: tokens a second against the CPU alone, and against what was predicted.

Of every file an answer is computed by the CPU alone, by both with the GPU's memory capped, and by the GPU with all of
it; then by the CPU with drafts that the GPU makes and that are right as often as is asked for. Where time is up what is
left is named and left out. Used by scripts/gpu_check.py.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from offload.errors import StrataError
from offload.gguf import GGUFFile
from planner.budget import format_size, measure_budget
from planner.gpu_choice import OFF, chosen_gpu
from planner.model_shape import ModelShape
from planner.plan import Plan
from planner.prediction import Measurement
from planner.ways import HYBRID, PROGRAM
from runtime.engine import Engine
from runtime.sampler import SamplingParams
from runtime.speculative.options import DraftOptions
from scripts.random_gguf import write_model

LEAST_GAIN = 1.5  # decoding, over the CPU alone, with the greatest cap
MOST_OFF = 0.15  # of predictions
LEAST_SHARE = 0.6  # of the bandwidth limit, for a model that is all on the GPU
ACCEPTANCE = 0.7
CONTEXT_TOKENS = 1024
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Shape:
    """A file to write: a shape of random_gguf with so many layers; `draft_layers`: of a draft with its vocabulary."""

    name: str
    shape: str
    layers: int
    quant_type: str = "Q4_0"
    draft_layers: int = 0


SHAPES = (
    Shape("1B", "llama1b", 16),
    Shape("OLMoE", "olmoe", 16, draft_layers=1),
    Shape("Qwen3-30B-A3B", "qwen3moe12", 48),
)


@dataclass(frozen=True, slots=True)
class Setting:
    """How files are measured: `gpu` as for --gpu, `caps` bytes of its memory, times by `time.monotonic`."""

    gpu: str
    caps: Sequence[int]
    stops_at: float
    prompt_tokens: int = 256
    answer_tokens: int = 64
    threads: int | None = None
    bandwidth_bytes_per_s: float | None = None  # of the GPU's memory; None: shares are left out

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to be begun."""
        return time.monotonic() >= self.stops_at


@dataclass(frozen=True, slots=True)
class Run:
    """One way of computing an answer."""

    way: str
    loop: str = HYBRID
    cap: int | None = None
    uses_gpu: bool = True
    draft: DraftOptions = field(default_factory=DraftOptions)


def shapes_in(folder: Path, setting: Setting, shapes: Sequence[Shape] = SHAPES) -> Iterator[Row]:
    """The rows of all shapes, whose files are written to a folder one after the other, and removed."""
    for shape in shapes:
        if setting.is_over:
            yield _left_out(shape.name, "all", "time is up")
            continue
        path, draft = folder / f"{shape.shape}.gguf", folder / f"{shape.shape}-draft.gguf"
        try:
            write_model(path, shape.shape, shape.quant_type, layers=shape.layers)
            if shape.draft_layers:
                write_model(draft, shape.shape, shape.quant_type, layers=shape.draft_layers)
            yield from rows_of(path, setting, name=shape.name, draft=draft if shape.draft_layers else None)
        finally:
            path.unlink(missing_ok=True)
            draft.unlink(missing_ok=True)


def rows_of(path: Path, setting: Setting, *, name: str = "", draft: Path | None = None) -> Iterator[Row]:
    """The rows of one file."""
    name = name or path.stem
    found: dict[str, Row] = {}
    for run in _runs(setting, draft):
        if setting.is_over:
            yield _left_out(name, run.way, "time is up")
            continue
        try:
            found[run.way] = _measured(path, setting, run)
        except StrataError as error:
            yield _left_out(name, run.way, str(error))
            continue
        yield {"check": "end to end", "model": name, "way": run.way, **found[run.way]}
    yield from _goals(path, name, setting, found)


def _runs(setting: Setting, draft: Path | None) -> Iterator[Run]:
    yield Run("CPU", PROGRAM, uses_gpu=False)
    for cap in sorted(setting.caps, reverse=True):
        yield Run(_capped(cap), cap=cap)
    yield Run("all of the GPU")
    if draft is not None:
        options = DraftOptions(str(draft), synthetic=ACCEPTANCE, forced=True)
        yield Run("CPU, drafts", PROGRAM, cap=max(setting.caps), draft=options)


def _measured(path: Path, setting: Setting, run: Run) -> Row:
    """Speeds of the second of two answers, with what was predicted of them."""
    gpu = chosen_gpu(setting.gpu) if run.uses_gpu else None
    budget = measure_budget(gpu)
    if run.cap is not None:
        budget = replace(budget, gpu_bytes=min(run.cap, budget.gpu_bytes))
    options: dict[str, Any] = {"threads": setting.threads, "context_tokens": CONTEXT_TOKENS, "draft": run.draft}
    with Engine(path, gpu=setting.gpu if run.uses_gpu else OFF, loop=run.loop, budget=budget, **options) as engine:
        prompt = np.random.default_rng(1).integers(3, engine.tokenizer.vocab_size - 3, setting.prompt_tokens).tolist()
        for _ in range(2):
            for _piece in engine.generate(
                prompt, max_tokens=setting.answer_tokens, sampling=SamplingParams(temperature=0)
            ):
                pass
        assert engine.measured is not None, "two answers were computed"
        return _row(engine.plan, engine.measured)


def _row(plan: Plan, measured: Measurement) -> Row:
    row: Row = {}
    predicted = plan.predicted
    for what, fact, promise in (
        ("decode", measured.decode_tokens_per_s, predicted.decode_tokens_per_s),
        ("prefill", measured.prefill_tokens_per_s, predicted.prefill_tokens_per_s),
    ):
        row[what] = round(fact, 2) if fact else None
        row[f"{what}_predicted"] = round(promise, 2) if promise else None
    row["gpu_mib"] = round((measured.peak_gpu_bytes or 0) / 2**20, 1)
    if plan.draft is not None:
        row["draft_on"] = plan.draft.device
    return row


def _goals(path: Path, name: str, setting: Setting, found: dict[str, Row]) -> Iterator[Row]:
    """What is to be reached, as far as it was measured."""
    for way, row in found.items():
        for what in ("decode", "prefill"):
            if way.startswith("GPU") and row[what] and row[f"{what}_predicted"]:
                ratio = row[what] / row[f"{what}_predicted"]
                yield _goal(f"{what} over prediction", name, way, round(ratio, 3), abs(ratio - 1) <= MOST_OFF)
    cpu, most = found.get("CPU"), _capped(max(setting.caps))
    if cpu is not None and most in found and cpu["decode"] and found[most]["decode"]:
        gain = found[most]["decode"] / cpu["decode"]
        yield _goal("decode over CPU", name, most, round(gain, 2), gain >= LEAST_GAIN)
    whole = found.get("all of the GPU")
    if whole is not None and whole["decode"] and setting.bandwidth_bytes_per_s:
        with GGUFFile.open(path) as gguf:
            read_bytes = sum(unit.active_bytes for unit in ModelShape.from_gguf(gguf).units)
        share = read_bytes * whole["decode"] / setting.bandwidth_bytes_per_s
        is_goal = name == SHAPES[0].name
        yield _goal("share of bandwidth", name, "all of the GPU", round(share, 3), share >= LEAST_SHARE or not is_goal)


def _goal(goal: str, model: str, way: str, found: float, is_met: bool) -> Row:
    return {"check": "goal", "goal": goal, "model": model, "way": way, "found": found, "ok": is_met}


def _left_out(model: str, way: str, reason: str) -> Row:
    return {"check": "left out", "model": model, "way": way, "reason": reason}


def _capped(cap: int) -> str:
    return f"GPU of {format_size(cap)}"
