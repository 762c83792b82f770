"""Compiles every Triton kernel for NVIDIA GPUs from Pascal to Blackwell without a GPU, and counts instructions.

    python -m scripts.check_ptx [--capability 86 ...] [--types Q4_0 Q4_K ...] [--quick] [--json]

One line a kernel and GPU generation: matrix instructions, float32 multiply-adds, wide loads, and bfloat16 arithmetic,
which GPUs before Ampere do not have. In JSON also a hash of the layouts of what is summed, which fix the order of
sums, and one of the code.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from gpu_kernels.blocks import GROUP, KVBlocks, KVRows, Lanes, Rotation, row_numbers
from gpu_kernels.decoding import DECODINGS
from gpu_kernels.dispatch import BUCKETS, Dispatch
from gpu_kernels.matrix import GpuMatrix
from gpu_kernels.ptx import CAPABILITIES, SHARED_KIB, Launch, compile_ptx, recorded
from gpu_kernels.tiles import GpuTraits
from gpu_kernels.triton_kernels import TritonKernels

PROCESSORS = 20
CACHES = ("f16", "q8_0", "q4_0", "bf16")  # types of keys and values
WHOLE = {"f16": torch.float16, "bf16": torch.bfloat16}
PATTERNS = {
    "mma": r"\bmma\.sync|wgmma\.mma_async",
    "fma_f32": r"\bfma\.rn(\.ftz)?\.f32",
    "loose_f32": r"\b(?:mul|add)(?:\.ftz)?\.f32",  # that the assembler may fuse
    "wide_loads": r"ld\.global[.\w:]*\.v4|cp\.async\.c[ag]",
    "bf16": r"\b(?:fma|mul|add|sub|mma)\b[.\w]*\.bf16",
}


def launches(capability: int, quant_types: list[str], *, is_quick: bool = False) -> Iterator[tuple[str, Launch]]:
    """(label, launch) of every kernel as it would be launched on such a GPU; quick: of products and attention alone."""
    few, many, decoded = (_kernels(capability, way) for way in ("few", "many", "decoded"))
    for name in quant_types:
        yield from _labelled(f"{name}, 1 column", partial(_product, few, name, 1))
        yield from _labelled(f"{name}, 16 columns", partial(_product, many, name, 16))
    for kind in CACHES:
        yield from _labelled(_cache_label("decode", kind), partial(_attention, many, 1, kind))
    if is_quick:
        return
    for name in quant_types[:1]:
        yield from _labelled(f"{name}, 64 columns", partial(_product, many, name, 64))
        yield from _labelled(f"{name}, decoded", partial(_product, decoded, name, 64))
        yield from _labelled(f"{name}, experts", partial(_experts, many, name))
    exact = replace(many, is_exact=True)
    for tokens in (16, 64):
        yield from _labelled(f"float32, {tokens} columns", partial(_product, exact, quant_types[0], tokens))
        yield from _labelled(f"float32 attention of {tokens}", partial(_attention, exact, tokens))
    for kind in CACHES:
        yield from _labelled(_cache_label("prefill", kind), partial(_attention, many, 64, kind))
    for tokens in (1, 64):
        yield from _labelled(f"part of a context, {tokens}", partial(_attention, many, tokens, is_part=True))
    yield from _labelled("", partial(_rows, many))


def step_launches(capability: int, quant_types: list[str]) -> Iterator[tuple[str, Launch]]:
    """(label, launch) of products of a step: whatever the columns, sums must be made alike."""
    for way in ("few", "many"):
        for name in quant_types:
            for tokens in (1, 2, 17):
                yield from _labelled(f"{name}, {tokens}", partial(_product, _kernels(capability, way), name, tokens))
    for tokens in (1, 17):
        for kind, is_part in (("f16", False), ("f16", True), ("q8_0", False), ("q4_0", False)):
            work = partial(_attention, _kernels(capability, "few"), tokens, kind, is_part=is_part)
            yield from _labelled(f"{'part' if is_part else 'whole'} {kind}, {tokens}", work)


def _cache_label(step: str, kind: str) -> str:
    """Numbers of bfloat16 are multiplied as float32."""
    return f"{'float32 ' if kind == 'bf16' else ''}{step}, {kind} cache"


def _labelled(label: str, work: Callable[[], None]) -> Iterator[tuple[str, Launch]]:
    with recorded() as made:
        work()
    for launch in made:
        yield label, launch


def _kernels(capability: int, way: str) -> TritonKernels:
    table = {(name, bucket): way for name in DECODINGS for bucket in BUCKETS}
    return TritonKernels(Dispatch(GpuTraits(PROCESSORS, capability), table))


def _product(kernels: TritonKernels, name: str, tokens: int) -> None:
    x, out = torch.zeros((tokens, 2048)), torch.zeros((tokens, 2048))
    kernels.matmul(x, GpuMatrix.allocate(name, 2048, 2048), out)


def _experts(kernels: TritonKernels, name: str) -> None:
    matrix = GpuMatrix.allocate(name, 768, 2048, slots=2)
    segments = torch.zeros((8, 4), dtype=torch.int32)
    for pairs in (8, 512):
        kernels.expert_matmul(torch.zeros((pairs, 2048)), matrix, segments, torch.zeros((pairs, 768)))


def _rows_of_heads(kind: str, step: int) -> KVRows:
    """64 blocks of 64 tokens, turned if coded."""
    if kind in WHOLE:
        return KVRows(torch.zeros((64, 64, 4, 128), dtype=WHOLE[kind]), 128)
    dtype = torch.int8 if kind == "q8_0" else torch.uint8
    numbers = torch.zeros((64, 64, 4, row_numbers(dtype, 128, step)), dtype=dtype)
    return KVRows(numbers, 128, torch.zeros((64, 64, 4, 128 // GROUP)).half(), step, is_turned=True)


def _attention(kernels: TritonKernels, tokens: int, kind: str = "f16", *, is_part: bool = False) -> None:
    heads = 16
    cache = KVBlocks(_rows_of_heads(kind, 2 if kind == "q8_0" else 4), _rows_of_heads(kind, GROUP))
    lanes = Lanes(torch.zeros((1, 64), dtype=torch.int32), torch.full((1,), 4096, dtype=torch.int32))
    rows = torch.zeros((tokens, (heads + 8) * 128))
    queries, keys, values = rows[:, : heads * 128], rows[:, heads * 128 : -512], rows[:, -512:]
    rotation = Rotation(torch.zeros((4096, 64)), torch.zeros((4096, 64)), neighbours=False)
    norm = torch.ones(128)
    places = (torch.zeros(tokens, dtype=torch.int32), rotation, cache, lanes)
    kernels.heads(queries, keys, values, *places, query_norm=norm, key_norm=norm, eps=1e-6)
    out, marks = torch.zeros((tokens, heads * 128)), torch.zeros((tokens, 2 * heads))
    kernels.attention(queries, cache, lanes, out, scale=0.1, marks=marks if is_part else None)
    if is_part:
        kernels.join_parts(out, marks, torch.zeros((tokens, heads * (128 + 2))))


def _rows(kernels: TritonKernels) -> None:
    x, weight = torch.zeros((4, 2048)), torch.zeros(2048)
    ids, weights = torch.zeros((4, 8), dtype=torch.int32), torch.zeros((4, 8))
    kernels.rms_norm(x, weight, x, eps=1e-6)
    kernels.add_norm(x, x, weight, x, eps=1e-6)
    kernels.gate(x, x, x, activation="silu")
    kernels.route(torch.zeros((4, 128)), ids, weights, norm=True)
    kernels.gather_rows(x, ids[:, 0].contiguous(), x)
    count = torch.zeros(1, dtype=torch.int32)
    kernels.scatter_add_weighted(x, x, weights[:, 0].contiguous(), ids[:, 0].contiguous(), count)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, nargs="+", default=list(CAPABILITIES), choices=CAPABILITIES)
    parser.add_argument("--types", nargs="+", default=list(DECODINGS), choices=list(DECODINGS))
    parser.add_argument("--quick", action="store_true", help="products and attention alone")
    parser.add_argument("--steps", action="store_true", help="products and attention of 1, 2 and 17 tokens alone")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    options = parser.parse_args()
    for capability in options.capability:
        seen = set()
        made = (
            step_launches(capability, options.types)
            if options.steps
            else launches(capability, options.types, is_quick=options.quick)
        )
        for label, launch in made:
            compiled = compile_ptx(launch, capability)
            text = compiled.ptx
            if (launch.name, text) in seen and not options.steps:
                continue
            seen.add((launch.name, text))
            counts = {name: len(re.findall(pattern, text)) for name, pattern in PATTERNS.items()}
            counts["shared_bytes"] = compiled.shared_bytes
            row = {"capability": capability, "kernel": launch.name, "label": label, **counts}
            row |= {"sums": _hash("\n".join(compiled.sums)), "code": _hash(text)}
            if compiled.shared_bytes > 1024 * SHARED_KIB[capability]:
                sys.exit(f"more shared memory than such a GPU has: {row}")
            if options.json:
                print(json.dumps(row), flush=True)
            else:
                numbers = "  ".join(f"{name} {count:5}" for name, count in counts.items())
                print(f"sm_{capability:<4}{launch.name:22}{label:26}{numbers}", flush=True)


if __name__ == "__main__":
    main()
