"""Check the hybrid executor on a simulated GPU: tokens of random placements, and how well the devices overlap.

    python scripts/check_hybrid.py tokens [--plans 200] [--tokens 200] [--seed 1]
    python scripts/check_hybrid.py overlap [--gpu sim:...] [--slots 0.5] [--steps 40] [--threads 1] [--attention]
        [--fetches]

`tokens` runs the demo and small models of every architecture (float weights) with random placements, and compares each
greedy path with that of the CPU alone; prints a line a model and fails where a path differs. The CPU rounds activations
for the demo's weights, the GPU does not: there, fails where a placement is `FARTHER` times as far from the float
reference as the CPU alone, and prints both. `overlap` decodes with a routed model of float weights (4 layers of 16
experts of 6 MiB, 4 used), half of whose experts have places on the GPU by default, and compares a step's time with what
each lane was busy: the GPU, the link's two directions (all modelled), and the CPU's program without its waits; and
tells of the rest of a step in how much of it only other lanes were busy, since a layer waits for the one before, and in
how much none was. The
simulated GPU's arithmetic is left out (`scripts.left_out`): two cores that do it in more than the modelled time would
show how slow they are, not how well the devices overlap. Attention is the CPU's, or with `--attention` the GPU's. With
`--fetches` experts that were lacking are fetched meanwhile, which takes its share of the link and the GPU. Not beside
other work.
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, seed, settings

from cpu_kernels.program import Program
from gpu_kernels.simulated import SimulatedDevice
from offload import gpu_slots
from offload.gguf import GGUFFile
from runtime.architectures import describe
from runtime.executor import Step
from runtime.executor.hybrid import HybridExecutor, HybridPlacement
from runtime.models import DEMO_MODEL
from scripts.left_out import LeftOut
from tests.support import models, programs, running
from tests.support.divergence import kl_divergences
from tests.support.hybrid import BRINGING, continued, greedy, hybrid, model_of, placements

FARTHER = 2.0
SPEC = "sim:vram=4GiB,bw=1GB/s,link=6GB/s,tflops=6"  # slow enough for the model of it to dominate what it takes
ROUTED = models.Spec("qwen3moe", blocks=4, qk_norm="head", experts=16, experts_used=4, ffn=2048)


def cases(folder: Path) -> Iterator[tuple[str, Path, bool]]:
    """(name, file, whether both devices' kernels are exact)."""
    yield "demo", DEMO_MODEL, False
    for name in (*models.FAMILIES, *models.VARIANTS):
        for quant_type in ("F32", "F16") if name in models.FAMILIES else ("F32",):
            path = folder / f"{name}-{quant_type}.gguf"
            yield path.stem, models.write_model(path, models.spec_of(name), quant_type), True


def check_tokens(plans: int, tokens: int, first_seed: int) -> int:
    """How many of `plans` random placements gave other tokens than the CPU alone."""
    wrong = done = 0
    with tempfile.TemporaryDirectory() as folder:
        every = list(cases(Path(folder)))
        for number, (name, path, exact) in enumerate(every):
            count = plans * (number + 1) // len(every) - plans * number // len(every)
            if not count:
                continue
            worst, bad, took_s = check_model(path, count, tokens, first_seed + number, exact=exact)
            wrong, done = wrong + bad, done + count
            print(f"{name:24} {count:3} plans  {bad} differ  greatest KL {worst:.1e}  {took_s:.1f} s", flush=True)
    print(f"{done} plans of {tokens} tokens, {wrong} differ")
    return wrong


def check_model(path: Path, count: int, tokens: int, number: int, *, exact: bool) -> tuple[float, int, float]:
    """(greatest KL divergence, placements that differ, seconds)."""
    model, prompt = model_of(path), models.prompt(length=40)
    with programs.executor(path) as runner:
        chosen, rows = greedy(runner, prompt, tokens)
    reference, bound = rows, math.inf
    if not exact:
        ids = [*prompt, *chosen[:-1]]
        reference = running.logits_of(path, ids, capacity_tokens=len(ids), kv_dtype=torch.float16)[-tokens:]
        divergences = kl_divergences(reference, rows)
        bound = FARTHER * float(divergences.max())
        print(
            f"{path.stem}: the CPU alone is up to {divergences.max():.1e} from the reference, most tokens "
            f"{np.median(divergences):.1e}"
        )
    worst, bad, began = 0.0, 0, time.perf_counter()

    @seed(number)
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(placement=placements(model))
    def check(placement: HybridPlacement) -> None:
        nonlocal worst, bad
        with hybrid(path, placement, rates=BRINGING, threads=2) as runner:
            ours = continued(runner, prompt, chosen)
        divergence = float(kl_divergences(reference, ours).max())
        worst = max(worst, divergence)
        if divergence > bound or (exact and ours.argmax(-1).tolist() != chosen):
            bad += 1
            print(f"{path.stem}: {placement} (KL divergence {divergence:.2e})", file=sys.stderr)

    check()
    return worst, bad, time.perf_counter() - began


def measure_overlap(path: Path, gpu: str, share: float, steps: int, threads: int, *, attention: bool) -> float:
    """A step's time in proportion to that of its busiest lane."""
    with GGUFFile.open(path) as file:
        model = describe(file)
        layers = frozenset(range(model.block_count))
        slots = int(share * model.expert_count * model.block_count)
        seeds = tuple((layer, expert) for expert in range(model.expert_count) for layer in sorted(layers))
        place = (layers if attention else frozenset(), layers)
        placement = HybridPlacement(*place, output=attention, expert_slots=slots, seeds=seeds[:slots])
        device = SimulatedDevice(gpu)
        kernels = LeftOut(model.expert_count)
        runner = HybridExecutor(model, file, placement, device, threads=threads, context_tokens=128, kernels=kernels)
        kv = runner.new_kv(128)
        runner.forward([Step(list(range(3, 35)), kv)])
        tokens = np.random.default_rng(1).integers(3, model.vocab_size, steps + 8).tolist()
        for token in tokens[:8]:
            runner.forward([Step([token], kv)])
        busy = BusyProgram(runner)
        device.reset_lanes()
        began = time.perf_counter()
        for token in tokens[8:]:
            runner.forward([Step([token], kv)])
        step_s = (time.perf_counter() - began) / steps
        tasks = {lane.name: [(task.start_s, task.end_s) for task in lane.tasks] for lane in device.lanes()}
        tasks["cpu"] = busy.tasks
        lanes = {name: covered_s(each) / steps for name, each in tasks.items()}
        any_s = covered_s(sorted(task for each in tasks.values() for task in each)) / steps
        counts = runner.gpu_expert_counts
        runner.close()
    print(f"simulated GPU {gpu}, {slots} of {model.expert_count * model.block_count} experts have places; {counts}")
    print(f"step {step_s * 1e3:.2f} ms; " + ", ".join(f"{name} {value * 1e3:.2f} ms" for name, value in lanes.items()))
    ratio = step_s / max(lanes.values())
    print(f"step / busiest lane = {ratio:.3f}")
    alone_s = any_s - max(lanes.values())
    print(f"only other lanes busy {alone_s * 1e3:.2f} ms, none {(step_s - any_s) * 1e3:.2f} ms")
    return ratio


def covered_s(tasks: Sequence[tuple[float, float]]) -> float:
    """Seconds in which any of them (start, end) goes on; in the order in which they start."""
    total_s, until_s = 0.0, -math.inf
    for start_s, end_s in tasks:
        total_s += max(end_s - max(start_s, until_s), 0.0)
        until_s = max(until_s, end_s)
    return total_s


class BusyProgram:
    """What the CPU's programs do when, but for rows in which they wait for the GPU: `tasks` (start, end), seconds."""

    def __init__(self, runner: HybridExecutor) -> None:
        self.tasks: list[tuple[float, float]] = []
        pool: Any = runner._hybrid._pool
        self._run = pool.run
        pool.run = self._timed

    def _timed(self, program: Program) -> None:
        times = np.zeros(len(program) + 1, np.int64)
        self._run(program, times)
        rows = zip(program.names, pairwise((times / 1e9).tolist()), strict=True)
        self.tasks += [moments for name, moments in rows if name != "from_gpu"]


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    tokens = commands.add_parser("tokens")
    tokens.add_argument("--plans", type=int, default=200)
    tokens.add_argument("--tokens", type=int, default=200)
    tokens.add_argument("--seed", type=int, default=1)
    overlap = commands.add_parser("overlap")
    overlap.add_argument("--attention", action="store_true")
    overlap.add_argument("--fetches", action="store_true")
    overlap.add_argument("--gpu", default=SPEC)
    overlap.add_argument("--slots", type=float, default=0.5)
    overlap.add_argument("--steps", type=int, default=40)
    overlap.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.command == "tokens":
        return 1 if check_tokens(args.plans, args.tokens, args.seed) else 0
    if not args.fetches:
        gpu_slots.FETCHES = 0
    with tempfile.TemporaryDirectory() as folder:
        path = models.write_model(Path(folder) / "routed.gguf", ROUTED, "F32")
        measure_overlap(path, args.gpu, args.slots, args.steps, args.threads, attention=args.attention)
    return 0


if __name__ == "__main__":
    sys.exit(main())
