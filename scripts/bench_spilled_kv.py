"""Measures decode behind a long context of which a part lies on flash, beside its bounds and the plan's prediction.

    python scripts/bench_spilled_kv.py MODEL.gguf [--depth N] [--context N] [--kv-ram SIZE | --budget SIZE]
        [--kv-budget B] [--limit-mib M] [--tokens N] [--threads T] [--alike] [--no-bounds] [--json]

The cache is filled with random numbers. The bounds are the drive's, which reads what a step reads and does nothing
else, and the processor's, with all keys and values in RAM (unless --no-bounds); logits must be the same bits in both.
With --kv-budget tokens that choose what they read are measured too, with as much RAM: random keys are the worst case,
where what is chosen lies apart and changes from token to token. With --alike one token comes again and again: 84% of
what it chooses of the 1B shape was chosen for the one before, as of text by trained models (68 to 95%).
With --limit-mib it runs in a memory control group of its own (version 1; needs root), whose peak is told.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offload.kv_chunks import Chunk
from offload.kv_spill import SpillFile
from offload.memory import read_buffer
from planner.budget import MIB, measure_budget, parse_budget, parse_size
from planner.solve import for_prompt
from runtime.engine import Engine
from runtime.executor.base import Step
from runtime.executor.program import ProgramExecutor, ProgramKV
from scripts.bench_sessions import fill
from scripts.bench_streamed import control_group

WARM_UP = 16  # tokens after which a cache holds what is chosen most
RING_SLOTS = 32


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--depth", type=int, default=16384)
    parser.add_argument("--context", type=int)
    parser.add_argument("--kv-ram")
    parser.add_argument("--budget")
    parser.add_argument("--kv-budget", type=int)
    parser.add_argument("--limit-mib", type=int)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--alike", action="store_true")
    parser.add_argument("--no-bounds", action="store_true")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    options = parser.parse_args()
    if options.limit_mib is not None:
        raise SystemExit(_limited(options.limit_mib))
    result = measured(options)
    print(json.dumps(result) if options.json else "\n".join(f"{name}: {value}" for name, value in result.items()))


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """What was measured, by name; times in milliseconds."""
    result = _beside_bounds(options, None)
    if options.kv_budget is not None:
        part = _beside_bounds(options, options.kv_budget)
        part["share_of_bytes"] = round(part["read_mib"] / result["read_mib"], 4)
        part["times_as_fast"] = round(result["decode_ms"][1] / part["decode_ms"][1], 2)
        result |= {f"budget_{name}": value for name, value in part.items()}
    return result


def _beside_bounds(options: argparse.Namespace, kv_budget: int | None) -> dict[str, Any]:
    result, logits = spilled(options, kv_budget)
    if options.no_bounds:
        return result
    with Engine(options.model, **_wishes(options), kv_budget=kv_budget) as engine:
        assert isinstance(engine.executor, ProgramExecutor), "as the other"
        kv = engine.executor.new_kv(engine.context_tokens)
        fill(kv, options.depth)
        decoded(engine.executor, kv, WARM_UP, alike=options.alike)
        times, plain = decoded(engine.executor, kv, options.tokens, alike=options.alike)
    if kv_budget is None:
        bound = max(1e3 * statistics.median(times), result.get("drive_ms", 0.0))
        result["share_of_bound"] = round(bound / result["decode_ms"][1], 3)
    return result | {"all_in_ram_ms": _quantiles(times), "same_bits": bool(np.array_equal(logits, plain))}


def spilled(options: argparse.Namespace, kv_budget: int | None) -> tuple[dict[str, Any], NDArray[np.float32]]:
    """Of an engine whose keys and values go to flash, read whole or as far as tokens choose; the last logits."""
    budget = None if options.budget is None else parse_budget(f"ram={options.budget}", measure_budget())
    ram = None if options.kv_ram is None else parse_size(options.kv_ram)
    with Engine(options.model, **_wishes(options), budget=budget, kv_ram_bytes=ram, kv_budget=kv_budget) as engine:
        executor = engine.executor
        assert isinstance(executor, ProgramExecutor), "the loop that spills"
        spill = executor.kv_tiers.store.spill
        kv = executor.new_kv(engine.context_tokens)
        fill(kv, options.depth)
        decoded(executor, kv, WARM_UP, alike=options.alike)
        before = 0 if spill is None else spill.read_bytes
        times, logits = decoded(executor, kv, options.tokens, alike=options.alike)
        read = 0 if spill is None else (spill.read_bytes - before) / options.tokens
        predicted = for_prompt(engine.plan, engine._gguf, options.depth).predicted
        result: dict[str, Any] = {
            "depth": options.depth,
            "cold_pieces": executor.kv_tiers.cold_pieces,
            "decode_ms": _quantiles(times),
            "read_mib": round(read / MIB, 1),
            "predicted_ms": round(1e3 / predicted.decode_tokens_per_s, 1),
            "predicted_over_measured": round(1 / predicted.decode_tokens_per_s / statistics.median(times), 3),
            "notes": list(engine.plan.notes),
        }
        if kv_budget is None and spill is not None and not options.no_bounds:
            result["drive_ms"] = round(1e3 * drive_seconds(spill, kv), 1)
    return result, logits


def _wishes(options: argparse.Namespace) -> dict[str, Any]:
    """What all engines are made with."""
    context = options.context or options.depth + 512
    types = {"cache_type_k": "f16", "cache_type_v": "f16"}
    return {"context_tokens": context, "threads": options.threads, "gpu": "off", **types}


def _quantiles(times: list[float]) -> list[float]:
    """p20, p50, p80 in milliseconds."""
    return [round(1e3 * float(value), 1) for value in np.quantile(times, (0.2, 0.5, 0.8))]


def decoded(
    executor: ProgramExecutor, kv: ProgramKV, tokens: int, *, alike: bool
) -> tuple[list[float], NDArray[np.float32]]:
    """Seconds of each token, and the last one's logits."""
    times = []
    for _ in range(tokens):
        started = time.perf_counter()
        logits = executor.forward([Step([7 if alike else kv.length % 1000], kv)])[0]
        times.append(time.perf_counter() - started)
    return times, logits


def drive_seconds(spill: SpillFile, kv: ProgramKV) -> float:
    """The median of five times that reading what a step reads takes alone."""
    chunks = [chunk for layer in range(len(kv.layout.layers)) for chunk in kv.chunks(layer) if chunk.memory is None]
    ring = read_buffer(RING_SLOTS * spill.slot_bytes)[: RING_SLOTS * spill.slot_bytes].reshape(RING_SLOTS, -1)
    return statistics.median(_read_all(spill, chunks, ring) for _ in range(5))


def _read_all(spill: SpillFile, chunks: list[Chunk], ring: NDArray[np.uint8]) -> float:
    left = threading.Semaphore(0)
    started = time.perf_counter()
    for number, chunk in enumerate(chunks):
        assert chunk.slot is not None, "it is on flash"
        place = ring[number % RING_SLOTS][: chunk.num_bytes]
        spill.submit(chunk.slot, place, left.release, lambda _: left.release())
    for _ in chunks:
        left.acquire()
    return time.perf_counter() - started


def _limited(limit_mib: int) -> int:
    """Runs the same command in a control group; its exit code."""
    words = [word for word in sys.argv[1:] if not word.startswith("--limit-mib")]
    at = sys.argv.index("--limit-mib") if "--limit-mib" in sys.argv else -1
    if at > 0:
        words.remove(sys.argv[at + 1])
    with control_group(limit_mib) as group:

        def enter() -> None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

        done = subprocess.run(
            [sys.executable, "-m", "scripts.bench_spilled_kv", *words], check=False, preexec_fn=enter, timeout=900
        )
        peak = int((group / "memory.max_usage_in_bytes").read_text()) / MIB
    print(f"exit code {done.returncode}, peak {peak:.0f} of {limit_mib} MiB")
    return done.returncode


if __name__ == "__main__":
    main()
