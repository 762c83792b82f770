"""Hold predictions to what runs measure, on random models of several types, shapes, prompts and threads: a table.

    python scripts/check_predictions.py FOLDER [--only SUBSTRING]

Room in FOLDER for one file at a time (4 GB). Every configuration runs in processes of its own with an empty cache
folder: the machine's profile is measured, the plan is made, and then the run; nothing is learned from earlier runs. The
answer has as many tokens as predictions are made for.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offload.gguf import GGUFFile
from planner.cost import ANSWER_TOKENS
from planner.solve import plan_here
from runtime.engine import Engine
from runtime.sampler import SamplingParams
from runtime.text import ModelText
from scripts.random_gguf import write_model


@dataclass(frozen=True, slots=True)
class Case:
    """One configuration."""

    shape: str
    quant_type: str
    threads: int
    prompt_tokens: int

    @property
    def name(self) -> str:
        """As in the table's first column."""
        return f"{self.shape} {self.quant_type}, {self.threads} threads, prompt {self.prompt_tokens}"


CASES = tuple(
    Case(*parts)
    for parts in (
        ("llama1b", "Q8_0", 1, 2048),
        ("llama1b", "Q8_0", 2, 512),
        ("llama1b", "Q4_K_M", 2, 1024),
        ("llama1b", "Q4_K_M", 1, 8192),
        ("llama1b", "Q6_K", 1, 512),
        ("llama1b", "IQ4_XS", 2, 2048),
        ("llama1b", "Q2_K", 1, 1024),
        ("llama1b", "F16", 2, 512),
        ("llama1b", "MXFP4", 1, 4096),
        ("llama1b", "Q3_K_M", 2, 16000),
        ("qwen3moe12", "Q4_K_M", 2, 1024),
        ("bitnet2b", "TQ2_0", 1, 512),
    )
)


def run_case(path: Path, threads: int, prompt_tokens: int) -> dict[str, Any]:
    """Plan and run in this process; prediction and measurement."""
    with GGUFFile.open(path) as gguf, ModelText(gguf) as text:
        context = prompt_tokens + ANSWER_TOKENS
        plan = plan_here(gguf, context_tokens=context, threads=threads, prompt_tokens=prompt_tokens)
        with Engine(gguf, plan, text=text) as engine:
            ids = np.random.default_rng(1).integers(300, plan.model.vocab_size, prompt_tokens).tolist()
            stays = {engine.tokenizer.eos_id: -100.0} if engine.tokenizer.eos_id is not None else {}
            sampling = SamplingParams(temperature=0.0, logit_bias=stays)
            for _ in engine.generate(ids, max_tokens=ANSWER_TOKENS - 1, sampling=sampling):
                pass
            assert engine.measured is not None
            return {"predicted": plan.predicted.as_dict(), "measured": engine.measured.as_dict()}


def row(case: Case, result: dict[str, Any]) -> tuple[str, list[float]]:
    """A line of the table, and predicted over measured for decode, first token and peak memory."""
    cells, ratios = [], []
    for key, scale in (("decode_tokens_per_s", 1.0), ("ttft_s", 1.0), ("peak_ram_bytes", 2.0**-20)):
        predicted, measured = result["predicted"][key] * scale, result["measured"][key] * scale
        ratios.append(predicted / measured)
        cells.append(f"{predicted:.4g} | {measured:.4g} | {predicted / measured - 1:+.0%}")
    return f"| {case.name} | {' | '.join(cells)} |", ratios


def main() -> None:
    """Write a file, run its cases, delete it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--case", nargs=2, type=int, metavar=("THREADS", "PROMPT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run_case(options.folder, *options.case)))
        return
    head = " | ".join(f"{name} | measured | error" for name in ("decode t/s", "first token s", "peak RAM MiB"))
    print(f"| configuration | {head} |\n| --- |{' ---: |' * 9}")
    ratios: list[list[float]] = []
    cases = [case for case in CASES if options.only in case.name]
    for case in cases:
        path = options.folder / f"{case.shape}_{case.quant_type}.gguf"
        if not path.exists():
            write_model(path, case.shape, case.quant_type)
        with tempfile.TemporaryDirectory(dir=options.folder) as cache:
            command = [sys.executable, __file__, str(path), "--case", str(case.threads), str(case.prompt_tokens)]
            environment = {**os.environ, "XDG_CACHE_HOME": cache}
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        line, found = row(case, json.loads(done.stdout.splitlines()[-1]))
        print(line, flush=True)
        ratios.append(found)
        if not any((later.shape, later.quant_type) == (case.shape, case.quant_type) for later in cases[len(ratios) :]):
            path.unlink()
    for name, column in zip(("decode", "first token", "peak RAM"), zip(*ratios, strict=True), strict=True):
        errors = [abs(ratio - 1) for ratio in column]
        print(f"\n{name}: mean error {statistics.fmean(errors):.0%}, worst {max(errors):.0%}")


if __name__ == "__main__":
    main()
