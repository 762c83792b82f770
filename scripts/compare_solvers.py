"""Compare the planner's placements with the greedy one and with llama.cpp's order of filling: a markdown table.

    python scripts/compare_solvers.py [--machines 100] [--seed 1]

Random machines (RAM 4 to 64 GiB, GPU 0 to 24 GiB, drives of 0.2 to 7 GB/s) x five model shapes in Q4_0, one token of
decode at a context of 4096, judged by the simulator. Seconds are simulated.
"""

import argparse
import random
import statistics
import time

from cpu_kernels.bandwidth import RatePoint
from offload.tiers import Device, Tier
from planner.fill_order import solve_fill_order
from planner.greedy import solve_greedy
from planner.items import placement_problem
from planner.machine import Cpu, Flash, FlashPoint, Gpu, Machine
from planner.machine_files import with_kernels
from planner.milp import solve_milp
from planner.plan import Objective, Settings, WeightsForm
from planner.simulate import step_seconds
from planner.solvers import best_assignment
from tests.support.shapes import SHAPES

GIB = 1 << 30
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


def main() -> None:
    """One row a shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    settings = Settings(4096, 512, 8, WeightsForm.PACKED, "float16", "simulated", "gpu")
    print("| shape | fits | greedy / plan | fill order / plan | worse | linear program / plan, worst | solve s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, shape in SHAPES.items():
        draw = random.Random(options.seed)
        over_greedy, over_fill, milp, solve = [], [], [], []
        for _ in range(options.machines):
            machine = random_machine(draw)
            gpu_bytes = machine.gpu.memory_bytes if machine.gpu else 0
            problem = placement_problem(
                *(shape, machine, settings),
                objective=Objective.LATENCY,
                ram_bytes=machine.ram_bytes,
                gpu_bytes=gpu_bytes,
                tiers=PLACES,
            )
            started = time.perf_counter()
            best = best_assignment(problem)
            solve.append(time.perf_counter() - started)
            if best is None:
                continue
            greedy = min((step_seconds(problem, found) for found in solve_greedy(problem)), default=float("inf"))
            filled = solve_fill_order(problem)
            over_greedy.append(greedy / best.seconds)
            if filled is not None:
                over_fill.append(step_seconds(problem, filled) / best.seconds)
            if (alone := solve_milp(problem, time_limit_s=1.2)) is not None:
                milp.append(step_seconds(problem, alone) / best.seconds)
        finite = [ratio for ratio in over_greedy if ratio < float("inf")]
        worse = sum(ratio < 1 for ratio in over_greedy + over_fill)
        print(
            f"| {name} | {len(over_greedy)} | {statistics.geometric_mean(finite):.2f} | "
            f"{statistics.geometric_mean(over_fill):.2f} | {worse} | {max(milp):.3f} | {max(solve):.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
