"""Measures what reopening a saved session costs against computing its tokens again.

    python scripts/bench_sessions.py MODEL.gguf [--tokens N] [--threads T] [--folder DIR] [--json]

Prefill is measured in chunks at several depths, over a cache whose rows before are random numbers, and added up over
the session's tokens; writing and reading are of the whole session, to and from files past the page cache. What is
reopened is compared with what was written, bit for bit.
"""

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from offload.kv_session_folder import BlockFolder
from runtime.engine import Engine
from runtime.executor.base import KVHandle, Step
from runtime.executor.saved_rows import SavedRows
from runtime.session_rows import KeptRows

CHUNK_TOKENS = 256
DEPTHS = 4  # beside the beginning
READS = 3


@dataclass(frozen=True, slots=True)
class Result:
    """What was measured; seconds of the whole session."""

    model: str
    tokens: int
    threads: int
    num_bytes: int
    prefill_tokens_per_s: dict[int, float]
    prefill_s: float
    write_s: float
    read_s: list[float]

    @property
    def ratio(self) -> float:
        """Prefill against the slowest read."""
        return self.prefill_s / max(self.read_s)

    def describe(self) -> str:
        """In three lines."""
        speeds = ", ".join(f"{speed:.1f} at {depth}" for depth, speed in self.prefill_tokens_per_s.items())
        size, read = self.num_bytes / 2**20, max(self.read_s)
        return (
            f"{self.model}, {self.tokens} tokens, {size:.0f} MiB of KV, {self.threads} threads\n"
            f"prefill: {self.prefill_s:.1f} s (tokens/s: {speeds})\n"
            f"written in {self.write_s:.2f} s ({size / self.write_s:.0f} MiB/s), reopened in {read:.3f} s "
            f"({size / read:.0f} MiB/s): {self.ratio:.0f} times faster than prefill"
        )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the session is written; default: the system's for temporary")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="strata-sessions-", dir=options.folder))
    try:
        with Engine(options.model, context_tokens=options.tokens + 64, threads=options.threads, gpu="off") as engine:
            result = measured(engine, options.tokens, options.threads, folder)
    finally:
        shutil.rmtree(folder)
    print(json.dumps({**asdict(result), "ratio": result.ratio}) if options.json else result.describe())


def measured(engine: Engine, tokens: int, threads: int, folder: Path) -> Result:
    """Measures with an engine whose caches can be saved."""
    ids = np.random.default_rng(1).integers(3, engine.tokenizer.vocab_size, tokens + 1).tolist()
    kv = engine.executor.new_kv(engine.context_tokens)
    fill(kv, tokens)
    speeds = {depth: prefill_speed(engine, kv, depth, tokens, ids) for depth in depths(tokens)}
    rows = KeptRows(engine.rows_keys(), [BlockFolder(folder)], "bench")
    started = time.perf_counter()
    rows.write(kv, ids[:tokens])
    write_s = time.perf_counter() - started
    read_s = [reopened(engine, rows, kv, ids, tokens) for _ in range(READS)]
    return Result(
        model=engine.model_id,
        tokens=tokens,
        threads=threads,
        num_bytes=sum(held.num_bytes for held in BlockFolder(folder).held()),
        prefill_tokens_per_s=speeds,
        prefill_s=prefill_seconds(speeds, tokens),
        write_s=write_s,
        read_s=read_s,
    )


def fill(kv: KVHandle, tokens: int) -> None:
    """Random rows, of the size that keys and values have."""
    assert isinstance(kv, SavedRows), "a loop whose caches can be saved"
    layout, rng = kv.rows_layout, np.random.default_rng(2)
    for index in range(tokens // layout.block_tokens):
        rows = rng.standard_normal(layout.block_bytes // 2, np.float32).astype(np.float16)
        kv.import_block(index, rows.view(np.uint8))
    kv.restored(tokens)


def depths(tokens: int) -> list[int]:
    """Where prefill is measured: at the beginning and up to the end, whole chunks."""
    last = tokens - CHUNK_TOKENS
    return [last * part // DEPTHS // CHUNK_TOKENS * CHUNK_TOKENS for part in range(DEPTHS + 1)]


def prefill_speed(engine: Engine, kv: KVHandle, depth: int, tokens: int, ids: list[int]) -> float:
    """Tokens a second of a chunk behind `depth` tokens; the better of two."""
    assert isinstance(kv, SavedRows), "asked before"
    seconds = []
    for _ in range(2):
        kv.truncate(depth)
        started = time.perf_counter()
        engine.executor.forward([Step(ids[depth : depth + CHUNK_TOKENS], kv)])
        seconds.append(time.perf_counter() - started)
    kv.restored(tokens)
    return CHUNK_TOKENS / min(seconds)


def prefill_seconds(speeds: dict[int, float], tokens: int) -> float:
    """Of all tokens: the time a token takes grows with its depth, straight between two that were measured."""
    points = sorted(speeds)
    each = np.interp(np.arange(tokens), points, [1 / speeds[depth] for depth in points])
    return float(each.sum())


def reopened(engine: Engine, rows: KeptRows, kv: KVHandle, ids: list[int], tokens: int) -> float:
    """Seconds until a new cache holds the session; RuntimeError if it does not hold what was written."""
    assert isinstance(kv, SavedRows), "asked before"
    new = engine.executor.new_kv(engine.context_tokens)
    started = time.perf_counter()
    held = rows.restore(new, ids, 0)
    seconds = time.perf_counter() - started
    assert isinstance(new, SavedRows), "as the other"
    layout = kv.rows_layout
    told, its = np.empty(layout.block_bytes, np.uint8), np.empty(layout.block_bytes, np.uint8)
    for index in range(tokens // layout.block_tokens):
        kv.export_block(index, told)
        new.export_block(index, its)
        if not np.array_equal(told, its):
            raise RuntimeError(f"block {index} of the reopened session differs")
    if held != tokens // layout.block_tokens * layout.block_tokens:
        raise RuntimeError(f"{held} of {tokens} tokens were reopened")
    return seconds


if __name__ == "__main__":
    main()
