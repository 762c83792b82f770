"""Measures decoding that reads a part of the KV cache against decoding that reads all of it, in turn.

    python scripts/bench_kv_budget.py MODEL.gguf [--tokens N] [--budget B] [--threads T] [--rounds R] [--kv-type TYPE]

Both caches are filled with the same random numbers. Random keys are the worst case for the search: no leaf stands out.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from cpu_kernels.kv_layout import KVLayout
from cpu_kernels.kv_policy import KVPolicy
from cpu_kernels.kv_types import KVType
from runtime.engine import Engine
from runtime.executor.base import Step
from runtime.executor.program import ProgramExecutor, ProgramKV

DECODED_TOKENS = 8  # of each cache in a round


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kv-type", type=KVType, default=KVType.F16)
    options = parser.parse_args()
    context = options.tokens + 64
    with Engine(options.model, context_tokens=context, threads=options.threads, gpu="off", loop="program") as engine:
        executor = engine.executor
        assert isinstance(executor, ProgramExecutor), "asked for by its loop"
        kinds = options.kv_type, options.kv_type
        policies = [KVPolicy(*kinds, budget_tokens=budget) for budget in (None, options.budget)]
        caches = [executor.new_kv(context, policy) for policy in policies]
        for kv in caches:
            fill(kv, options.tokens)
            _decode(executor, kv, options.tokens)
        times: list[list[float]] = [[], []]
        for _ in range(options.rounds):
            for kv, taken in zip(caches, times, strict=True):
                taken.append(_decode(executor, kv, options.tokens))
        abstracts = caches[1].abstracts
        assert abstracts is not None, "a budget was given"
        counts = abstracts.counts
        dense, chosen = (statistics.median(taken) for taken in times)
        print(f"{options.model}, {options.tokens} tokens, {options.threads} threads, KV {options.kv_type}")
        for name, taken in zip(("all", f"budget {options.budget}"), times, strict=True):
            print(f"{name}: {', '.join(f'{1000 * each:.2f}' for each in taken)} ms a token")
        print(f"{dense / chosen:.2f} times as fast; {100 * counts.read_blocks / counts.blocks:.1f}% of blocks read")
        layers = zip(abstracts.layout.layers, caches[1].layout.layers, strict=True)
        shares = [place.num_bytes / _plain_bytes(layout) for place, layout in layers if place is not None]
        print(f"{counts.bounds / max(counts.leaves, 1):.2f} bounds for each leaf; abstracts {shares[0]:.4f} of float16")


def _plain_bytes(layout: KVLayout) -> int:
    """Of a layer's keys and values in float16."""
    return 2 * layout.capacity_tokens * layout.kv_heads * (layout.key_length + layout.value_length)


def fill(kv: ProgramKV, tokens: int) -> None:
    """Puts random rows into a cache, of keys that differ in size as those of models do."""
    random = np.random.default_rng(0)
    layout = kv.rows_layout
    rows = (random.standard_normal(layout.block_bytes // 2) * 0.5).astype(np.float16).view(np.uint8)
    for block in range(tokens // layout.block_tokens):
        kv.import_block(block, np.roll(rows, 2 * block))
    kv.restored(tokens)


def _decode(executor: ProgramExecutor, kv: ProgramKV, tokens: int) -> float:
    """Seconds a token, behind `tokens` tokens."""
    kv.truncate(tokens)
    started = time.perf_counter()
    for token in range(DECODED_TOKENS):
        executor.forward([Step([token + 5], kv)])
    return (time.perf_counter() - started) / DECODED_TOKENS


if __name__ == "__main__":
    main()
