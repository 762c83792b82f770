"""Measures decoding and prompts behind a filled KV cache of each type against float16, in turn; beside llama.cpp.

    python scripts/bench_kv_types.py MODEL.gguf [--tokens N] [--types q8_0 kivi4 ...] [--rounds R] [--peer]

Caches are filled with random numbers. A round decodes a few tokens and computes a chunk of a prompt with each type;
ratios are of the same round. `--peer` measures llama.cpp with float16 and with q8_0, whose cache is filled with short
sequences that then become one, since a prompt of 16384 tokens takes it many minutes.
"""

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cpu_kernels.kv_policy import KVPolicy
from cpu_kernels.kv_types import KVType
from runtime.engine import Engine
from runtime.executor.base import Step
from runtime.executor.program import ProgramExecutor
from scripts.bench_kv_budget import fill

DECODED_TOKENS = 8
CHUNK_TOKENS = 256
PEER_SEQUENCES = 64

Decode = Callable[[int], float]  # how many tokens at once -> seconds


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--types", type=KVType, nargs="+", default=[KVType.Q8_0, KVType.KIVI4])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", action="store_true")
    options = parser.parse_args()
    place = options.model, options.tokens, options.threads
    print(f"{options.model}, behind {options.tokens} tokens, {options.threads} threads")
    with ours(*place, [KVType.F16, *options.types]) as passes:
        if options.peer:
            with peers(*place, ("f16", "q8_0")) as others:
                compare({**passes, **others}, options.rounds)
        else:
            compare(passes, options.rounds)


def compare(passes: dict[str, Decode], rounds: int) -> None:
    """Runs all in turn and prints medians, of times and of ratios to the first in the same round."""
    for name, tokens, unit in (("decode", 1, "ms a token"), ("prompt", CHUNK_TOKENS, f"ms for {CHUNK_TOKENS} tokens")):
        times = [{one: 1e3 * run(tokens) for one, run in passes.items()} for _ in range(rounds + 1)][1:]
        first = next(iter(passes))
        for one in passes:
            ratios = sorted(each[first] / each[one] for each in times)
            middle = statistics.median(each[one] for each in times)
            print(
                f"{name} {one}: {middle:.2f} {unit}, {statistics.median(ratios):.2f} times as fast as {first} "
                f"({ratios[0]:.2f} to {ratios[-1]:.2f})",
                flush=True,
            )


@contextmanager
def ours(model: Path, tokens: int, threads: int, types: list[KVType]) -> Iterator[dict[str, Decode]]:
    """By type what runs a pass behind a cache of it."""
    context = tokens + 2 * CHUNK_TOKENS
    with Engine(model, context_tokens=context, threads=threads, gpu="off", loop="program") as engine:
        executor = engine.executor
        assert isinstance(executor, ProgramExecutor), "asked for by its loop"

        def cache(kind: KVType) -> Decode:
            kv = executor.new_kv(context, KVPolicy(kind, kind))
            fill(kv, tokens)

            def run(count: int) -> float:
                kv.truncate(tokens)
                started, times = time.perf_counter(), DECODED_TOKENS if count == 1 else 1
                for _ in range(times):
                    executor.forward([Step([5] * count, kv)])
                return (time.perf_counter() - started) / times

            return run

        yield {kind.value: cache(kind) for kind in types}


@contextmanager
def peers(model: Path, tokens: int, threads: int, types: tuple[str, ...]) -> Iterator[dict[str, Decode]]:
    """The same of llama.cpp, with flash attention."""
    import llama_cpp as lib  # noqa: PLC0415 - optional

    lib.llama_backend_init()
    silent = lib.llama_log_callback(lambda *_: None)  # kept as long as it may be called
    lib.llama_log_set(silent, ctypes.c_void_p())
    its = lib.llama_model_default_params()
    its.n_gpu_layers = 0
    loaded = lib.llama_model_load_from_file(str(model).encode(), its)
    if not loaded:
        raise SystemExit(f"llama.cpp cannot load {model}")
    contexts = [_peer_context(lib, loaded, tokens, threads, kind) for kind in types]
    yield {
        f"llama.cpp {kind}": _peer_decode(lib, context, tokens) for kind, context in zip(types, contexts, strict=True)
    }
    for context in contexts:
        lib.llama_free(context)
    lib.llama_model_free(loaded)
    lib.llama_log_set(lib.llama_log_callback(), ctypes.c_void_p())  # its own again


def _peer_context(lib: Any, model: Any, tokens: int, threads: int, kind: str) -> Any:
    """A context whose sequence 0 has `tokens` tokens."""
    asked = lib.llama_context_default_params()
    asked.n_ctx, asked.n_batch, asked.n_ubatch = tokens + 2 * CHUNK_TOKENS, CHUNK_TOKENS, CHUNK_TOKENS
    asked.n_seq_max, asked.kv_unified = PEER_SEQUENCES, True
    asked.n_threads = asked.n_threads_batch = threads
    asked.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
    asked.type_k = asked.type_v = {"f16": lib.GGML_TYPE_F16, "q8_0": lib.GGML_TYPE_Q8_0}[kind]
    context = lib.llama_init_from_model(model, asked)
    if not context:
        raise SystemExit(f"llama.cpp makes no context with {kind}")
    each, memory = tokens // PEER_SEQUENCES, lib.llama_get_memory(context)
    for sequence in range(PEER_SEQUENCES):
        _peer_pass(lib, context, each * sequence, each, sequence)
    for sequence in range(1, PEER_SEQUENCES):
        lib.llama_memory_seq_cp(memory, sequence, 0, -1, -1)
        lib.llama_memory_seq_rm(memory, sequence, -1, -1)
    return context


def _peer_decode(lib: Any, context: Any, tokens: int) -> Decode:
    def run(count: int) -> float:
        lib.llama_memory_seq_rm(lib.llama_get_memory(context), 0, tokens, -1)
        started, times = time.perf_counter(), DECODED_TOKENS if count == 1 else 1
        for number in range(times):
            _peer_pass(lib, context, tokens + number * count, count, 0)
        lib.llama_synchronize(context)
        return (time.perf_counter() - started) / times

    return run


def _peer_pass(lib: Any, context: Any, first: int, count: int, sequence: int) -> None:
    """So many tokens of a sequence, from a position on."""
    batch = lib.llama_batch_init(count, 0, 1)
    batch.n_tokens = count
    for number in range(count):
        batch.token[number] = 5
        batch.pos[number] = first + number
        batch.n_seq_id[number] = 1
        batch.seq_id[number][0] = sequence
        batch.logits[number] = number == count - 1
    code = lib.llama_decode(context, batch)
    lib.llama_batch_free(batch)
    if code:
        raise SystemExit(f"llama.cpp fails with {code}")


if __name__ == "__main__":
    main()
