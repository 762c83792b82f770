"""Matmul kernels on this machine: share of the read bandwidth at few columns, multiplications a second at many.

Prints a JSON line for every quant type, kernel family and number of columns, or what `cpu_kernels.tune` would choose.

    python -m scripts.bench_kernels --types Q4_0,Q8_0 --columns 1,4,8,128 --threads 1 --seconds 10
"""

import argparse
import json
from dataclasses import asdict

from cpu_kernels.formats import has_panel_format
from cpu_kernels.isa import choose, current
from cpu_kernels.measure import KernelFigure, kernel_table
from cpu_kernels.quant_types import QUANT_TYPES, quant_type
from cpu_kernels.tune import tune


def main() -> None:
    """Measures and prints."""
    arguments = _arguments()
    isa = choose(arguments.isa) if arguments.isa else current()
    names = arguments.types.split(",") if arguments.types else [kind.name for kind in QUANT_TYPES.values()]
    kinds = [kind for kind in map(quant_type, names) if has_panel_format(kind)]
    if arguments.tune:
        print(json.dumps(asdict(tune(kinds, threads=arguments.threads, seconds_budget=arguments.seconds, isa=isa))))
        return
    columns = [int(n) for n in arguments.columns.split(",")]
    for figure in kernel_table(kinds, columns, threads=arguments.threads, seconds_budget=arguments.seconds, isa=isa):
        print(json.dumps(_rounded(figure)), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default="")
    parser.add_argument("--columns", default="1,4,8,128")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--isa", default="")
    parser.add_argument("--tune", action="store_true")
    return parser.parse_args()


def _rounded(figure: KernelFigure) -> dict[str, object]:
    values = asdict(figure)
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in values.items()}


if __name__ == "__main__":
    main()
