"""Compare strata with llama.cpp over quant types, on random models of one shape, alternating: a markdown table.

    python scripts/bench_types.py FOLDER [--shape llama1b] [--types Q4_0 Q8_0 ...] [--threads 1 2] [--repetitions 5]

Needs the extra `peer` and room in FOLDER for one file at a time. Each figure is the median over the repetitions of
`strata bench --peer llama.cpp`: prompt of 128 tokens, then 32 tokens one by one.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from scripts.random_gguf import write_model

TYPES = ("Q8_0", "Q6_K", "Q4_K_M", "Q4_0", "IQ4_XS", "MXFP4", "Q3_K_M", "Q2_K", "TQ2_0", "TQ1_0", "IQ2_XXS", "F16")
TESTS = ("-p", "128", "-n", "32")


def bench(path: Path, threads: int, repetitions: int) -> dict[str, dict[str, Any]]:
    """Rows of `strata bench` by the name of the test."""
    command = [
        sys.executable,
        "-m",
        "runtime.cli",
        "bench",
        "-m",
        str(path),
        "-t",
        str(threads),
        "-r",
        str(repetitions),
    ]
    done = subprocess.run(
        [*command, *TESTS, "--peer", "llama.cpp", "-o", "jsonl"], stdout=subprocess.PIPE, text=True, check=True
    )
    return {row["test"]: row for row in map(json.loads, done.stdout.splitlines())}


def cells(row: dict[str, Any]) -> str:
    """Ours, the peer's, and the median ratio of the pairs."""
    ours, theirs = statistics.median(row["samples_ts"]), statistics.median(row["peer_samples_ts"])
    return f"{ours:.1f} | {theirs:.1f} | {row['ratio']:.2f}"


def main() -> None:
    """Write, measure and delete one file after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", default="llama1b")
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--threads", nargs="+", type=int, default=(1, 2))
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    print("| type | threads | decode t/s | peer | ratio | prefill 128 t/s | peer | ratio |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in options.types:
        path = options.folder / f"{options.shape}-{name}.gguf"
        write_model(path, options.shape, name)
        try:
            for threads in options.threads:
                rows = bench(path, threads, options.repetitions)
                print(f"| {name} | {threads} | {cells(rows['tg32'])} | {cells(rows['pp128'])} |", flush=True)
        finally:
            path.unlink()


if __name__ == "__main__":
    main()
