"""Compare strata with llama.cpp on models larger than the memory they may use: one JSON line a run, then a table.

    python scripts/bench_streamed.py MODEL.gguf --limit-mib 1873 [--rounds 3] [--readahead 128 8192] [--threads 2]

Each run is a process in a memory control group of its own (version 1, mounted under /sys/fs/cgroup/memory; needs root)
with the file dropped from the page cache before: a prompt of random tokens, a few tokens to warm up, then tokens one by
one. llama.cpp maps the file and does not repack (repacked weights do not fit), once for each readahead of the drive.
Runs alternate; the table has medians over the rounds. Needs the extra `peer`.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

GROUPS = Path("/sys/fs/cgroup/memory")
CHUNK = 512


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of the prompt, to warm up, and that are timed."""

    prompt: int
    warm_up: int
    decoded: int

    @property
    def context(self) -> int:
        """All of them, and some room."""
        return self.prompt + self.warm_up + self.decoded + 8


def run_ours(path: Path, threads: int, ids: list[int], lengths: Lengths) -> dict[str, Any]:
    """By a plan for what the control group leaves."""
    from runtime.engine import Engine  # noqa: PLC0415 - each worker imports one of the two
    from runtime.executor.base import Step  # noqa: PLC0415

    started = time.perf_counter()
    with Engine(path, context_tokens=lengths.context, threads=threads) as engine:
        loaded = time.perf_counter()
        kv, chunk = engine.executor.new_kv(lengths.context), engine.plan.settings.prefill_chunk_tokens
        for first in range(0, lengths.prompt, chunk):
            engine.executor.forward([Step(ids[first : min(first + chunk, lengths.prompt)], kv)])
        read = time.perf_counter()
        before = engine.executor.cache_counts
        decode = _decode(lambda token: engine.executor.forward([Step([token], kv)]), ids, lengths)
        counts = engine.executor.cache_counts.since(before)
        predicted = engine.plan.predicted
        return {
            "load_s": loaded - started,
            "prefill_tokens_per_s": lengths.prompt / (read - loaded),
            "decode_tokens_per_s": decode,
            "predicted_decode_tokens_per_s": predicted.decode_tokens_per_s,
            "stream_slots": engine.plan.settings.stream_slots,
            **counts.as_dict(),
            "mb_per_token": counts.bytes_read / (lengths.warm_up + lengths.decoded) / 1e6,
        }


def run_peer(path: Path, threads: int, ids: list[int], lengths: Lengths) -> dict[str, Any]:
    """llama.cpp on the mapped file."""
    import llama_cpp as lib  # noqa: PLC0415

    lib.llama_backend_init()
    callback = lib.llama_log_callback(lambda _level, _text, _data: None)
    lib.llama_log_set(callback, None)
    started = time.perf_counter()
    model_params = lib.llama_model_default_params()
    model_params.use_mmap = True
    model_params.use_extra_bufts = False
    model = lib.llama_model_load_from_file(str(path).encode(), model_params)
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = lengths.context, CHUNK, CHUNK
    params.n_threads = params.n_threads_batch = threads
    context = lib.llama_init_from_model(model, params)
    loaded = time.perf_counter()

    def forward(tokens: list[int]) -> None:
        array = (lib.llama_token * len(tokens))(*tokens)  # the batch only points to it
        batch = lib.llama_batch_get_one(array, len(tokens))
        if lib.llama_decode(context, batch):
            raise SystemExit("llama.cpp failed")

    forward(ids[: lengths.prompt])
    read = time.perf_counter()
    decode = _decode(lambda token: forward([token]), ids, lengths)
    return {
        "load_s": loaded - started,
        "prefill_tokens_per_s": lengths.prompt / (read - loaded),
        "decode_tokens_per_s": decode,
    }


def _decode(forward: Any, ids: list[int], lengths: Lengths) -> float:
    """Tokens a second after a few."""
    for token in ids[lengths.prompt :][: lengths.warm_up]:
        forward(token)
    started = time.perf_counter()
    for token in ids[lengths.prompt + lengths.warm_up :][: lengths.decoded]:
        forward(token)
    return lengths.decoded / (time.perf_counter() - started)


def work(options: argparse.Namespace) -> None:
    """A worker's life: one run, one line."""
    lengths = Lengths(*options.lengths)
    ids = np.random.default_rng(1).integers(0, options.vocabulary, lengths.context).tolist()
    result = (run_ours if options.worker == "strata" else run_peer)(options.model, options.threads, ids, lengths)
    result["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(result))


@contextmanager
def control_group(limit_mib: int) -> Iterator[Path]:
    """A memory group under this process's own, with that limit."""
    own = next(
        line.split(":")[2] for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line
    ).strip("/")
    parent = GROUPS / own if (GROUPS / own).is_dir() else GROUPS
    group = parent / f"strata-bench-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit_mib << 20))
        yield group
    finally:
        group.rmdir()


def run(options: argparse.Namespace, who: str, readahead_kib: int | None) -> dict[str, Any]:
    """One run in a group of its own; what it printed, with the group's peak."""
    with options.model.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if readahead_kib is not None:
        options.queue.write_text(str(readahead_kib))
    command = [sys.executable, __file__, str(options.model), "--worker", who, "--threads", str(options.threads)]
    command += ["--vocabulary", str(options.vocabulary), "--lengths", *map(str, options.lengths)]
    with control_group(options.limit_mib) as group:

        def enter() -> None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=False, preexec_fn=enter, timeout=options.timeout_s
        )
        peak = int((group / "memory.max_usage_in_bytes").read_text()) / 2**20
    result = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": done.returncode}
    return {"who": who, "readahead_kib": readahead_kib, "group_peak_mib": peak, **result}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--limit-mib", type=int, default=1873)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--readahead", type=int, nargs="*", default=[128, 8192])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--lengths", type=int, nargs=3, default=[512, 4, 24], metavar=("PROMPT", "WARM_UP", "DECODED"))
    parser.add_argument("--queue", type=Path, default=Path("/sys/block/vda/queue/read_ahead_kb"))
    parser.add_argument("--timeout-s", type=float, default=300)
    parser.add_argument("--worker", choices=["strata", "llama.cpp"])
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    before = options.queue.read_text()
    runs: dict[str, list[dict[str, Any]]] = {}
    try:
        for _ in range(options.rounds):
            for who, readahead in [("strata", None), *(("llama.cpp", kib) for kib in options.readahead)]:
                result = run(options, who, readahead)
                print(json.dumps(result), flush=True)
                runs.setdefault(who if readahead is None else f"{who}, readahead {readahead} KiB", []).append(result)
    finally:
        options.queue.write_text(before)
    print("| | decode tokens/s | prefill tokens/s | load s | group's peak MiB |\n| --- | ---: | ---: | ---: | ---: |")
    for name, results in runs.items():
        cells = [
            statistics.median(result.get(key, 0.0) for result in results)
            for key in ("decode_tokens_per_s", "prefill_tokens_per_s", "load_s", "group_peak_mib")
        ]
        print(f"| {name} | {cells[0]:.2f} | {cells[1]:.1f} | {cells[2]:.2f} | {cells[3]:.0f} |")


if __name__ == "__main__":
    main()
