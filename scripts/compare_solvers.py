"""Compare the planner's placements with the greedy one and with llama.cpp's order of filling: a markdown table.

    python scripts/compare_solvers.py [--machines 100] [--seed 1] [--shape NAME]...

Random machines (RAM 4 to 64 GiB, GPU 0 to 24 GiB, drives of 0.2 to 7 GB/s) x six model shapes in Q4_0, one token of
decode at a context of 4096, judged by the simulator. Ratios are of simulated
seconds: means are geometric. `worse` counts plans slower than the greedy one or llama.cpp's.
"""

import argparse
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field

from cpu_kernels.bandwidth import RatePoint
from offload.tiers import Device, Tier
from planner.fill_order import solve_fill_order
from planner.greedy import solve_greedy
from planner.items import placement_problem
from planner.machine import Cpu, Flash, FlashPoint, Gpu, Machine
from planner.machine_files import with_kernels
from planner.patterns import solve_patterns
from planner.placement import PlacementProblem
from planner.plan import Objective, Settings, WeightsForm
from planner.simulate import step_seconds
from planner.solvers import best_assignment
from tests.support.shapes import SHAPES, make_shape

GIB = 1 << 30
ALL_SHAPES = {**SHAPES, "100 layers, 256 experts": make_shape(100, 4096, 1536, 512, 151936, experts=256, used=8)}
PLACES = frozenset((tier, device) for tier in Tier for device in Device if (tier, device) != (Tier.GPU, Device.CPU))


def random_machine(draw: random.Random) -> Machine:
    """Anything from a small laptop to a workstation."""
    read = draw.uniform(15e9, 90e9)
    cpu = Cpu("random", 8, (RatePoint(1, read / 2), RatePoint(8, read)), draw.uniform(1e11, 1e12), 1e-6)
    flash = Flash("random", (FlashPoint(1 << 20, 8, True, draw.uniform(0.2e9, 7e9)),), 1e9, 500 * GIB)
    gpu = None
    if draw.random() < 0.8:
        link = draw.uniform(3e9, 25e9)
        gpu = Gpu(
            *("random", draw.randint(2, 24) * GIB, draw.uniform(1e11, 1e12), draw.uniform(4e12, 8e13)),
            *(5e-6, link, link, 2e-5),
        )
    return Machine("random", "random", with_kernels(cpu), draw.randint(4, 64) * GIB, gpu, flash)


@dataclass(slots=True)
class Row:
    """What was found for one shape: ratios of simulated seconds to the plan's, seconds of solving, winners."""

    over_greedy: list[float] = field(default_factory=list)
    over_fill: list[float] = field(default_factory=list)
    over_patterns: list[float] = field(default_factory=list)
    solve_s: list[float] = field(default_factory=list)
    won: Counter[str] = field(default_factory=Counter)

    def add(self, problem: PlacementProblem) -> None:
        """Solve one problem in all ways."""
        started = time.perf_counter()
        best = best_assignment(problem)
        self.solve_s.append(time.perf_counter() - started)
        if best is None:
            return
        self.won[best.solver] += 1
        greedy = solve_greedy(problem)
        filled = solve_fill_order(problem)
        for ratios, found in (
            (self.over_greedy, greedy),
            (self.over_fill, [filled] if filled is not None else []),
            (self.over_patterns, solve_patterns(problem, greedy)),
        ):
            if found:
                ratios.append(min(step_seconds(problem, each) for each in found) / best.seconds)

    def text(self) -> str:
        """The cells of the table."""
        worse = sum(ratio < 1 for ratio in self.over_greedy + self.over_fill)
        won = ", ".join(f"{name} {count}" for name, count in self.won.most_common())
        return (
            f"{sum(self.won.values())} | {_mean(self.over_greedy)} | {max(self.over_greedy):.2f} | "
            f"{_mean(self.over_fill)} | {max(self.over_fill):.2f} | {worse} | {max(self.over_patterns):.3f} | {won} | "
            f"{statistics.median(self.solve_s):.2f} | {max(self.solve_s):.2f} |"
        )


def _mean(ratios: list[float]) -> str:
    return f"{statistics.geometric_mean(ratios):.3f}"


def main() -> None:
    """One row a shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--shape", action="append", choices=sorted(ALL_SHAPES), help="one or more; default: all")
    options = parser.parse_args()
    settings = Settings(
        context_tokens=4096,
        prefill_chunk_tokens=512,
        threads=8,
        weights_form=WeightsForm.PACKED,
        loop="simulated",
        device="gpu",
        stream_slots=0,
    )
    print(
        "| shape | fits | greedy / plan, mean | most | fill order / plan, mean | most | worse | patterns / plan, most ",
        end="",
    )
    print("| won | solve s, median | most |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: |", flush=True)
    for name in options.shape or ALL_SHAPES:
        draw = random.Random(options.seed)
        row = Row()
        for _ in range(options.machines):
            machine = random_machine(draw)
            problem = placement_problem(
                *(ALL_SHAPES[name], machine, settings),
                objective=Objective.LATENCY,
                ram_bytes=machine.ram_bytes,
                gpu_bytes=machine.gpu.memory_bytes if machine.gpu else 0,
                tiers=PLACES,
            )
            row.add(problem)
        print(f"| {name} | {row.text()}", flush=True)


if __name__ == "__main__":
    main()
