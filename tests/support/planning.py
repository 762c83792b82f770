"""Models as a planner sees them, without files: a header of any size, and a profile that was never measured."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from cpu_kernels.bandwidth import RatePoint
from cpu_kernels.isa import current
from cpu_kernels.quant_types import QUANT_TYPES, quant_type
from cpu_kernels.tuning import Choice, Family, Tuning
from gpu_kernels.bandwidth import GpuRates
from gpu_kernels.capabilities import GpuCapabilities
from offload.gguf_access import MetadataAccess
from offload.gguf_tensors import TensorInfo
from offload.gguf_values import MetadataValue
from planner.host import available_threads, cpu_name
from planner.machine import KernelPoint
from planner.profile import FORMAT_VERSION, Profile, software

GIB = 1 << 30
GPU = GpuCapabilities("a GPU", 80 * GIB, 78 * GIB, (9, 0), "cuda:0")
RATES = GpuRates("a GPU", 2e11, 6e12, 5e-6)


class HeaderOnly(MetadataAccess):
    """Stands for an open GGUF file: metadata and tensor index, no bytes."""

    def __init__(self, metadata: dict[str, MetadataValue], shapes: dict[str, tuple[str, tuple[int, ...]]]) -> None:
        """`shapes`: (quant type name, shape) of each tensor."""
        self.path = Path("models/test.gguf")
        self.metadata = metadata
        self.tensors: dict[str, TensorInfo] = {}
        offset = 4096
        for name, (type_name, shape) in shapes.items():
            kind = quant_type(type_name)
            num_bytes = int(np.prod(shape, dtype=object)) // kind.block_size * kind.block_bytes
            self.tensors[name] = TensorInfo(name, kind, shape, 0, offset, num_bytes)
            offset += num_bytes
        self.byte_size = offset

    @property
    def architecture(self) -> str:
        """`general.architecture`."""
        return self.get_str("general.architecture")


def header(
    *,
    layers: int = 2,
    width: int = 256,
    heads: int = 4,
    kv_heads: int = 2,
    ffn: int = 512,
    experts: int = 0,
    used: int = 0,
    shared: bool = False,
    vocab: int = 1000,
    tied: bool = True,
    context: int = 4096,
    weights: str = "Q8_0",
) -> HeaderOnly:
    """The header of a llama-like model; sizes must suit the blocks of the quant type."""
    metadata: dict[str, MetadataValue] = {
        "general.architecture": "llama",
        "llama.block_count": layers,
        "llama.context_length": context,
        "llama.embedding_length": width,
        "llama.feed_forward_length": ffn,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv_heads,
    }
    if experts:
        metadata |= {"llama.expert_count": experts, "llama.expert_used_count": used}
    kv_width = width // heads * kv_heads
    shapes = {"token_embd.weight": (weights, (vocab, width)), "output_norm.weight": ("F32", (width,))}
    if not tied:
        shapes["output.weight"] = (weights, (vocab, width))
    for layer in range(layers):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": ("F32", (width,)),
            f"blk.{layer}.attn_q.weight": (weights, (width, width)),
            f"blk.{layer}.attn_k.weight": (weights, (kv_width, width)),
            f"blk.{layer}.attn_v.weight": (weights, (kv_width, width)),
            f"blk.{layer}.attn_output.weight": (weights, (width, width)),
            f"blk.{layer}.ffn_norm.weight": ("F32", (width,)),
        }
        suffix, stack = ("_exps", (experts,)) if experts else ("", ())
        if experts:
            shapes[f"blk.{layer}.ffn_gate_inp.weight"] = ("F32", (experts, width))
        shapes |= {
            f"blk.{layer}.ffn_gate{suffix}.weight": (weights, (*stack, ffn, width)),
            f"blk.{layer}.ffn_up{suffix}.weight": (weights, (*stack, ffn, width)),
            f"blk.{layer}.ffn_down{suffix}.weight": (weights, (*stack, width, ffn)),
        }
        if shared:
            shapes[f"blk.{layer}.ffn_up_shexp.weight"] = (weights, (ffn, width))
    return HeaderOnly(metadata, shapes)


def llama_8b(weights: str = "Q4_K") -> HeaderOnly:
    """A model of the size of Llama 3 8B."""
    return header(
        layers=32, width=4096, heads=32, kv_heads=8, ffn=14336, vocab=128256, tied=False, context=8192, weights=weights
    )


def profile(*, threads: int = 4) -> Profile:
    """A machine of round figures: 40 GB/s, 100 GFLOP/s, 1 us an operation, 1 GB/s of any quant type dequantised.

    Products of any quant type read at RAM speed with one token, and take twenty times as long with 128.
    """
    points = tuple(
        KernelPoint(count, columns, rate / (20 if columns > 1 else 1), 2 * columns * rate)
        for count, rate in sorted({1: 10e9, threads: 40e9}.items())
        for columns in (1, 128)
    )
    usual = Choice(Family.DOT, current().tile_columns)
    return Profile(
        version=FORMAT_VERSION,
        cpu_name="test",
        software="test",
        physical_cores=threads,
        threads=threads,
        read=(RatePoint(1, 10e9), RatePoint(threads, 40e9)),
        matvec=(RatePoint(4 << 20, 80e9), RatePoint(128 << 20, 40e9)),
        matvec_single=(RatePoint(4 << 20, 20e9), RatePoint(128 << 20, 10e9)),
        matmul_flops_per_s=100e9,
        op_overhead_s=1e-6,
        dequantize_bytes_per_s={kind.name: 1e9 for kind in QUANT_TYPES.values()},
        kernels={kind.name: points for kind in QUANT_TYPES.values()},
        tuning=Tuning(current().name, {kind.name: usual for kind in QUANT_TYPES.values()}),
    )


def profile_here() -> Profile:
    """The same figures as a profile of the machine that the tests run on."""
    threads = available_threads()
    figures = profile(threads=threads)
    read = tuple({point.at: point for point in figures.read}.values())  # one point where there is one thread
    return replace(figures, cpu_name=cpu_name(), software=software(), physical_cores=threads, read=read)


def olmoe() -> HeaderOnly:
    """3.6 GiB, nearly all of it experts."""
    return header(
        layers=16,
        width=2048,
        heads=16,
        kv_heads=16,
        ffn=1024,
        experts=64,
        used=8,
        vocab=50304,
        tied=False,
        weights="Q4_0",
    )
