"""Write random-weight GGUF files at real model shapes, for measurements of speed and memory alone.

    python scripts/random_gguf.py SHAPE TYPE OUT.gguf [--layers N] [--router-skew SIGMA] [--seed S]
    python scripts/random_gguf.py --list

The mix of tensor types of a file type is the one that llama.cpp's quantiser chooses (random_gguf_types.json); MXFP4,
NVFP4 and F16 are uniform but for the embedding. Quantised blocks hold random codes under plausible scales, so that
activations stay finite; the text such a model writes is gibberish, and so is its vocabulary. `--router-skew` multiplies
each expert's router row by a log-normal factor of that sigma, so that some experts are chosen far more often.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
from numpy.typing import NDArray

from cpu_kernels.quant_types import QuantType, quant_type

TYPE_MAPS = Path(__file__).with_name("random_gguf_types.json")
UNIFORM_TYPES = ("MXFP4", "NVFP4", "F16")
CHUNK_BYTES = 64 << 20
ALIGNMENT = 32

# Byte offset and value of a block's float16 scale, and of its minimum where the type has one.
SCALES: Mapping[str, tuple[int, float]] = {
    "Q4_0": (0, 0.004), "Q4_1": (0, 0.004), "Q5_0": (0, 0.002), "Q8_0": (0, 0.00027), "Q2_K": (80, 0.002),
    "Q3_K": (108, 0.0005), "Q4_K": (0, 0.00014), "Q5_K": (0, 7e-5), "Q6_K": (208, 6.5e-5), "IQ2_XXS": (0, 0.0005),
    "IQ2_XS": (0, 0.0005), "IQ2_S": (0, 0.0005), "IQ3_XXS": (0, 0.0005), "IQ3_S": (0, 0.0003), "IQ1_S": (0, 0.003),
    "IQ4_NL": (0, 0.0003), "IQ4_XS": (0, 6.5e-5), "TQ1_0": (52, 0.025), "TQ2_0": (64, 0.025), "Q1_0": (0, 0.02),
    "Q2_0": (0, 0.02),
}  # fmt: skip
MINIMA: Mapping[str, tuple[int, float]] = {
    "Q2_K": (82, 0.003), "Q4_K": (2, 0.00105), "Q5_K": (2, 0.0011), "Q4_1": (2, -0.03),
}  # fmt: skip

# of scales, so that what a token's context adds does not drown the token, and routers see tokens that differ
FACTORS = {"token_embd": 16.0, "attn_output": 0.05}

Dimensions = tuple[int, ...]  # as GGUF has them: columns first


@dataclass(frozen=True)
class Shape:
    """The hyper-parameters that sizes follow from."""

    architecture: str
    embedding: int
    layers: int
    ffn: int
    heads: int
    kv_heads: int
    head_length: int
    vocabulary: int
    tied: bool
    context: int
    rope_base: float
    experts: int = 0
    experts_used: int = 0


SHAPES: Mapping[str, Shape] = {
    "llama1b": Shape("llama", 2048, 16, 8192, 32, 8, 64, 128256, True, 131072, 500000.0),
    "llama7b": Shape("llama", 4096, 32, 11008, 32, 32, 128, 32000, False, 4096, 10000.0),
    "olmoe": Shape("olmoe", 2048, 16, 1024, 16, 16, 128, 50304, False, 4096, 10000.0, 64, 8),
    "bitnet2b": Shape("bitnet", 2560, 30, 6912, 20, 5, 128, 128256, True, 4096, 500000.0),
    "qwen3moe12": Shape("qwen3moe", 2048, 12, 768, 32, 4, 128, 151936, False, 32768, 1e6, 128, 8),
}


def tensors(shape: Shape) -> Iterator[tuple[str, Dimensions]]:
    """Name and dimensions of every tensor."""
    width, queries, keys = shape.embedding, shape.heads * shape.head_length, shape.kv_heads * shape.head_length
    yield "token_embd.weight", (width, shape.vocabulary)
    yield "output_norm.weight", (width,)
    if not shape.tied:
        yield "output.weight", (width, shape.vocabulary)
    norms: dict[str, int] = {"attn_norm": width, "ffn_norm": width}
    if shape.architecture == "bitnet":
        norms |= {"attn_sub_norm": queries, "ffn_sub_norm": shape.ffn}
    elif shape.architecture == "olmoe":
        norms |= {"attn_q_norm": queries, "attn_k_norm": keys}
    elif shape.architecture == "qwen3moe":
        norms |= {"attn_q_norm": shape.head_length, "attn_k_norm": shape.head_length}
    matrices: dict[str, Dimensions] = {
        "attn_q": (width, queries),
        "attn_k": (width, keys),
        "attn_v": (width, keys),
        "attn_output": (queries, width),
    }
    if shape.experts:
        matrices |= {
            "ffn_gate_inp": (width, shape.experts),
            "ffn_gate_exps": (width, shape.ffn, shape.experts),
            "ffn_up_exps": (width, shape.ffn, shape.experts),
            "ffn_down_exps": (shape.ffn, width, shape.experts),
        }
    else:
        matrices |= {"ffn_gate": (width, shape.ffn), "ffn_up": (width, shape.ffn), "ffn_down": (shape.ffn, width)}
    for layer in range(shape.layers):
        yield from ((f"blk.{layer}.{name}.weight", (length,)) for name, length in norms.items())
        yield from ((f"blk.{layer}.{name}.weight", dimensions) for name, dimensions in matrices.items())


def type_of(name: str, dimensions: Dimensions, shape_name: str, file_type: str) -> QuantType:
    """The type of one tensor in a file of `file_type`."""
    if len(dimensions) == 1 or "gate_inp" in name:
        return quant_type("F32")
    if file_type in UNIFORM_TYPES:
        is_edge = name.startswith(("token_embd", "output."))
        return quant_type("Q6_K" if is_edge and file_type != "F16" else file_type)
    entry = json.loads(TYPE_MAPS.read_text())[shape_name][file_type]
    parts = name.split(".", 2)
    for other, patterns in entry["other"].items():
        if name in patterns or (parts[0] == "blk" and int(parts[1]) in (patterns.get(parts[2]) or ())):
            return quant_type(other)
    return quant_type(str(entry["default"]))


def random_blocks(rng: np.random.Generator, kind: QuantType, num_bytes: int, factor: float = 1.0) -> NDArray[Any]:
    """Random quant blocks with scales that keep activations finite, times `factor` where they are numbers.

    Half of the scales are negative: codes have a mean that is not zero, and what all rows have in common would grow
    from layer to layer until every token looked the same to the routers.
    """
    if kind.name == "F16":
        return (rng.standard_normal(num_bytes // 2, dtype=np.float32) * 0.02 * factor).astype(np.float16)
    words = rng.integers(0, 2**64, size=(num_bytes + 7) // 8, dtype=np.uint64)
    blocks = words.view(np.uint8)[:num_bytes].reshape(-1, kind.block_bytes)
    if kind.name == "MXFP4":
        blocks[:, 0] = 120
    elif kind.name == "NVFP4":
        blocks[:, :4] = 0x18
    else:
        negative = rng.integers(0, 2, len(blocks), np.uint8) << 7
        for table in (SCALES, MINIMA):
            if kind.name in table:
                offset, value = table[kind.name]
                blocks[:, offset : offset + 2] = np.frombuffer(np.float16(value * factor).tobytes(), np.uint8)
                blocks[:, offset + 1] ^= negative
    if kind.name == "Q6_K":
        blocks[:, 192:208] &= 0x1F  # small sub-scales
    if kind.name == "TQ2_0":
        codes = blocks[:, :64]
        codes &= ~((codes & (codes >> 1) & 0x55) << 1)  # 0, 1 and 2 alone
    return blocks


def write_header(writer: gguf.GGUFWriter, shape: Shape, name: str) -> None:
    """Hyper-parameters and a byte-level vocabulary filled up with unused tokens."""
    writer.add_name(name)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.embedding)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_length)
    writer.add_value_length(shape.head_length)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_rope_dimension_count(shape.head_length)
    writer.add_vocab_size(shape.vocabulary)
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(shape.experts_used)
        writer.add_expert_feed_forward_length(shape.ffn)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(code) for code in printable] + [chr(256 + place) for place in range(256 - len(printable))]
    merges = ["t h", "i n", "th e"]
    tokens = ["<|end|>", *letters, *(merge.replace(" ", "") for merge in merges)]
    tokens += [f"<|unused {place}|>" for place in range(shape.vocabulary - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [3, *[1] * (len(letters) + len(merges)), *[5] * (len(tokens) - len(letters) - len(merges) - 1)]
    )
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(True)


def write_tensor(
    file: BinaryIO, rng: np.random.Generator, name: str, dimensions: Dimensions, kind: QuantType, *, skew: float
) -> int:
    """Write one tensor with its padding; its bytes without."""
    rows = int(np.prod(dimensions[1:], dtype=np.int64))
    total = left = kind.row_bytes(dimensions[0]) * rows
    if "gate_inp" in name:
        weights = rng.standard_normal((rows, dimensions[0]), dtype=np.float32) * np.float32(0.02)
        factors = np.exp(rng.normal(0, skew, (rows, 1))) if skew else np.ones((rows, 1))
        file.write((weights * factors.astype(np.float32)).tobytes())
    elif len(dimensions) == 1:
        file.write(np.ones(dimensions[0], np.float32).tobytes())
    else:
        factor = next((factor for part, factor in FACTORS.items() if part in name), 1.0)
        chunk = max(1, CHUNK_BYTES // kind.block_bytes) * kind.block_bytes
        while left:
            size = min(left, chunk)
            file.write(np.ascontiguousarray(random_blocks(rng, kind, size, factor)).data.cast("B"))
            left -= size
    file.write(b"\0" * (-total % ALIGNMENT))
    return total


def write_model(
    path: Path, shape_name: str, file_type: str, *, layers: int | None = None, skew: float = 0.0, seed: int = 1
) -> int:
    """Write a whole file; the bytes of its tensors."""
    shape = SHAPES[shape_name] if layers is None else replace(SHAPES[shape_name], layers=layers)
    rng = np.random.default_rng(seed)
    table = [
        (name, dimensions, type_of(name, dimensions, shape_name, file_type)) for name, dimensions in tensors(shape)
    ]
    writer = gguf.GGUFWriter(str(path), shape.architecture)
    write_header(writer, shape, f"random-{shape_name}-{file_type}")
    for name, dimensions, kind in table:
        num_bytes = kind.row_bytes(dimensions[0]) * int(np.prod(dimensions[1:], dtype=np.int64))
        raw = (
            gguf.GGMLQuantizationType(kind.ggml_id)
            if kind.name in gguf.GGMLQuantizationType.__members__
            else kind.ggml_id
        )
        writer.add_tensor_info(name, list(reversed(dimensions)), np.dtype(np.float16), num_bytes, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file = writer.fout[0]
    file.flush()
    file.write(b"\0" * (-file.tell() % ALIGNMENT))
    total = sum(write_tensor(file, rng, name, dimensions, kind, skew=skew) for name, dimensions, kind in table)
    writer.close()
    return total


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", choices=SHAPES)
    parser.add_argument("type", nargs="?")
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--router-skew", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    known = {name: sorted({*types, *UNIFORM_TYPES}) for name, types in json.loads(TYPE_MAPS.read_text()).items()}
    if options.list or options.out is None:
        for name, types in known.items():
            print(name, *types)
        return
    if options.type not in known[options.shape]:
        parser.error(f"{options.shape} has no type {options.type}; known: {', '.join(known[options.shape])}")
    total = write_model(
        options.out, options.shape, options.type, layers=options.layers, skew=options.router_skew, seed=options.seed
    )
    print(options.out, f"{total / 1e9:.3f} GB of tensors")


if __name__ == "__main__":
    main()
