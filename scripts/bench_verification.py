"""Time of a step of several tokens over that of one, as drafts are verified: what speculation costs on this machine.

    python scripts/bench_verification.py MODEL.gguf [--threads 1 2] [--columns 1 2 4 8 16] [--repetitions 9]

Behind a context of 64 tokens, logits of all; medians, ratios pair by pair.
"""

import argparse
import statistics
import time
from pathlib import Path

from runtime.engine import Engine
from runtime.executor.base import Step

CONTEXT = 64


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--columns", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    parser.add_argument("--repetitions", type=int, default=9)
    options = parser.parse_args()
    most = CONTEXT + max(options.columns)
    print("| threads |", " | ".join(f"{count} columns" for count in options.columns), "|")
    print("|---:|", "|".join("---:" for _ in options.columns), "|", sep="")
    for threads in options.threads:
        with Engine(options.model, context_tokens=most, threads=threads) as engine:
            kv = engine.executor.new_kv(most)
            engine.executor.forward([Step(list(range(1, CONTEXT + 1)), kv)])
            seconds: dict[int, list[float]] = {count: [] for count in options.columns}
            for _ in range(options.repetitions):
                for count, samples in seconds.items():
                    kv.truncate(CONTEXT)
                    started = time.perf_counter()
                    engine.executor.forward([Step(list(range(100, 100 + count)), kv)], logits="all")
                    samples.append(time.perf_counter() - started)
        one = seconds[min(seconds)]
        cells = (
            f"{1e3 * statistics.median(samples):.1f} ms "
            f"({statistics.median(several / single for several, single in zip(samples, one, strict=True)):.2f})"
            for samples in seconds.values()
        )
        print(f"| {threads} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
