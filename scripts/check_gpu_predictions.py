"""Hold predictions of hybrid plans to what runs on a simulated GPU measure: random models, several GPUs, a table.

    python scripts/check_gpu_predictions.py FOLDER [--only SUBSTRING] [--json FILE]

Room in FOLDER for one file at a time. Every case runs in a process of its own, with a cache folder of its own that is
empty at first: the machine's profile is measured, the plan is made, then prompt and answer are computed. Of a run only
how often experts were found is learned, and then plan and run are made again. Everything is as in `strata run` but the
simulated GPU's arithmetic, which a CPU cannot do in the time that a GPU takes: its operations are launched with their
costs, its memory and its link are those of the description, and what it would compute, or arrange of what was copied to
it, is left out; only what routers choose is drawn, so that experts are used as evenly as can be. All times are those of
a simulation. A line tells how quiet the machine was: what other programs used of its CPUs meanwhile, and at what rate
its kernels read weights after the run, in proportion to the profile that the prediction is made of.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from gpu_kernels.matrix import GpuMatrix
from offload.cache_counts import CacheCounts
from offload.gguf import GGUFFile
from planner.budget import measure_budget
from planner.cost import ANSWER_TOKENS
from planner.gpu_choice import chosen_gpu
from planner.hybrid_hits import evened_slots, gpu_hits_key
from planner.machine import KernelPoint
from planner.plan import Plan
from planner.profile import load_or_measure
from planner.profile_kernels import measure_apart
from planner.profile_learned import record_hits
from planner.question import Wish
from planner.solve import HYBRID, question_here, solve
from runtime.backend import hybrid_executor
from runtime.executor.base import Step
from runtime.executor.hybrid.executor import HybridExecutor
from runtime.sampler import Sampler, SamplingParams
from scripts.left_out import LeftOut
from scripts.quiet import Others
from scripts.random_gguf import write_model

LIMIT = 0.10


@dataclass(frozen=True, slots=True)
class Case:
    """One configuration; `layers`: fewer than the shape has, so that files stay small."""

    shape: str
    quant_type: str
    layers: int
    gpu: str
    prompt_tokens: int
    context_tokens: int
    threads: int = 1

    @property
    def name(self) -> str:
        """As in the table's first column."""
        return f"{self.shape} {self.quant_type}, {self.layers} layers, {self.gpu}, prompt {self.prompt_tokens}"


# A laptop's GPU on PCIe 3.0 x8, a desktop's on 4.0 x8, and an old one; with less memory, as there are fewer layers.
LAPTOP, DESKTOP, OLD = (
    "bw=192GB/s,link=6GB/s,tflops=6",
    "bw=272GB/s,link=12GB/s,tflops=15",
    "bw=80GB/s,link=3GB/s,tflops=2",
)
CASES = tuple(
    Case(shape, kind, layers, f"sim:vram={vram},{rates}", prompt, context)
    for shape, kind, layers, vram, rates, prompt, context in (
        ("llama1b", "Q8_0", 16, "600MiB", LAPTOP, 512, 1024),
        ("llama1b", "Q4_0", 16, "400MiB", OLD, 256, 2048),
        ("llama1b", "Q4_K_M", 16, "2GiB", LAPTOP, 1024, 2048),
        ("llama7b", "Q4_0", 6, "700MiB", LAPTOP, 512, 1024),
        ("llama7b", "Q4_K_M", 6, "500MiB", DESKTOP, 300, 1024),
        ("olmoe", "Q4_0", 8, "700MiB", LAPTOP, 512, 1024),
        ("olmoe", "Q8_0", 8, "2GiB", DESKTOP, 256, 1024),
        ("olmoe", "Q4_K_M", 8, "1GiB", OLD, 128, 1024),
        ("olmoe", "Q4_0", 8, "4GiB", LAPTOP, 256, 1024),
        ("qwen3moe12", "Q4_0", 12, "1GiB", LAPTOP, 512, 1024),
        ("qwen3moe12", "Q4_K_M", 12, "2GiB", DESKTOP, 512, 1024),
    )
)


def run_case(path: Path, case: Case) -> dict[str, Any]:
    """Plan and run in this process, twice where a run teaches how often experts are found; the last of both."""
    with GGUFFile.open(path) as gguf:
        gpu = chosen_gpu(case.gpu)
        wish = Wish(case.context_tokens, case.threads, case.prompt_tokens, HYBRID)
        while True:
            plan = solve(question_here(gguf, wish, measure_budget(gpu), gpu=gpu))
            kernels = LeftOut(plan.model.expert_count)
            executor = hybrid_executor(gguf, plan, kernels=kernels)
            try:
                others = Others()
                with patch.object(GpuMatrix, "write", kernels.nothing):
                    measured = _measured(executor, plan, case.prompt_tokens)
                measured["others"] = others.share()
            finally:
                executor.close()
            if not (slots := evened_slots(plan)) or gpu_hits_key(plan.model) in load_or_measure().hits:
                break
            record_hits(load_or_measure(), gpu_hits_key(plan.model), slots, measured["hits"])
        predicted = plan.predicted
        before, kind = load_or_measure(), case.quant_type.removesuffix("_M")
        after = measure_apart([kind], before.threads)
        return {
            "kernels": _read_rate(after.types[kind], case.threads) / _read_rate(before.kernels[kind], case.threads),
            "gpu_parts": _parts(plan),
            "bound_by": predicted.bottleneck.value,
            "predicted": {
                "decode": predicted.decode_tokens_per_s,
                "prefill": predicted.prefill_tokens_per_s,
                "gpu_bytes": predicted.peak_gpu_bytes,
                "hits": predicted.hit_rate,
            },
            "measured": measured,
        }


def _measured(executor: HybridExecutor, plan: Plan, prompt_tokens: int) -> dict[str, Any]:
    """Tokens a second of the prompt, the better of two, and of an answer behind it; bytes and hits on the GPU."""
    rng = np.random.default_rng(1)
    ids = rng.integers(300, plan.model.vocab_size, prompt_tokens).tolist()
    chunk = plan.settings.prefill_chunk_tokens
    prefill = []
    for _ in range(3):
        kv = executor.new_kv(plan.settings.context_tokens)
        started = time.perf_counter()
        for start in range(0, prompt_tokens, chunk):
            last = start + chunk >= prompt_tokens
            executor.forward([Step(ids[start : start + chunk], kv)], logits="last" if last else "none")
        prefill.append(time.perf_counter() - started)
    steps, before = [], executor.gpu_expert_counts or CacheCounts()
    sampler = Sampler(SamplingParams(seed=1), plan.model.vocab_size)
    logits = rng.standard_normal(plan.model.vocab_size, np.float32)
    for token in rng.integers(300, plan.model.vocab_size, ANSWER_TOKENS).tolist():
        started = time.perf_counter()
        executor.forward([Step([token], kv)])
        sampler.sample(logits, 0)  # of drawn ones: those that were left out are all alike, which takes longer
        steps.append(time.perf_counter() - started)
    return {
        "decode": 1 / statistics.fmean(sorted(steps)[: int(0.95 * len(steps))]),
        "prefill": prompt_tokens / min(prefill[1:]),
        "gpu_bytes": executor.gpu_bytes,
        "hits": (executor.gpu_expert_counts or CacheCounts()).since(before).hit_rate,
    }


def _read_rate(points: Sequence[KernelPoint], threads: int) -> float:
    """Bytes a second of weights that meet one token."""
    return next(point.bytes_per_s for point in points if (point.threads, point.columns) == (threads, 1))


def _parts(plan: Plan) -> str:
    on_gpu = [placement.kind.value for placement in plan.placements if placement.device.value == "gpu"]
    counts = {kind: on_gpu.count(kind) for kind in dict.fromkeys(on_gpu) if kind != "kv"}
    slots = f", {plan.settings.gpu_slots} slots" if plan.settings.gpu_slots else ""
    return ", ".join(f"{count} {kind}" for kind, count in counts.items()) + slots


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(run_case(options.folder, CASES[options.case])))
        return
    chosen = [(number, case) for number, case in enumerate(CASES) if options.only in case.name]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = [row for number, case in chosen for row in _rows(Path(folder), number, case)]
    within = sum(abs(row["ratio"] - 1) <= LIMIT for row in rows)
    print(f"{within} of {len(rows)} predictions within {LIMIT:.0%} of the simulated run")
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _rows(folder: Path, number: int, case: Case) -> list[dict[str, Any]]:
    """One case in a process of its own, on a file that is written for it and removed for one of another shape."""
    path = folder / f"{case.shape}-{case.quant_type}-{case.layers}.gguf"
    if not path.is_file():
        for other in folder.glob("*.gguf"):
            other.unlink()
        write_model(path, case.shape, case.quant_type, layers=case.layers)
    command = [sys.executable, __file__, str(path), "--case", str(number)]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "XDG_CACHE_HOME": cache}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{case.name} failed:\n{done.stderr[-3000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    rows = []
    print(f"{case.name} (simulated): {result['gpu_parts']}; bound by {result['bound_by']}")
    for what in ("decode", "prefill"):
        promise, fact = result["predicted"][what], result["measured"][what]
        rows.append({"case": case.name, "what": what, "predicted": promise, "measured": fact, "ratio": fact / promise})
        print(f"    {what:<8} predicted {promise:9.1f} tokens/s  measured {fact:9.1f}  ratio {fact / promise:.2f}")
    held, planned = result["measured"]["gpu_bytes"], result["predicted"]["gpu_bytes"]
    if result["predicted"]["hits"] is not None:
        found = result["measured"]["hits"]
        print(f"    experts found on the GPU: predicted {result['predicted']['hits']:.0%}  measured {found:.0%}")
    others = result["measured"]["others"]
    print(f"    others used {others:.0%} of the CPUs; kernels afterwards {result['kernels']:.2f} of the profile")
    print(f"    GPU memory predicted {planned / 2**20:.0f} MiB  measured {held / 2**20:.0f} MiB", flush=True)
    return rows


if __name__ == "__main__":
    main()
