"""Whether the tensors of an operation fit together, for every implementation of `Kernels`. Knows no kernel.

ValueError for shapes and names, TypeError for types of numbers.
"""

import torch

from gpu_kernels.blocks import KVBlocks, Lanes, Rotation
from gpu_kernels.kernels import ACTIVATIONS
from gpu_kernels.matrix import GpuMatrix

_ACTIVATION_TYPES = (torch.float32, torch.float16)


def check_rows(operation: str, **tensors: torch.Tensor) -> None:
    """Activations: float32 or float16 matrices whose rows are contiguous."""
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or (tensor.shape[1] > 1 and tensor.stride(1) != 1):
            raise ValueError(f"{operation}: {name} of shape {tuple(tensor.shape)} and strides {tensor.stride()}")
        if tensor.dtype not in _ACTIVATION_TYPES:
            raise TypeError(f"{operation}: {name} is {tensor.dtype}, not float32 or float16")


def check_same(operation: str, **tensors: torch.Tensor) -> None:
    """Activations of one shape."""
    check_rows(operation, **tensors)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"{operation}: shapes differ: {shapes}")


def check_vector(operation: str, name: str, vector: torch.Tensor | None, length: int, dtype: torch.dtype) -> None:
    """A contiguous vector, or none."""
    if vector is None:
        return
    if vector.shape != (length,) or not vector.is_contiguous():
        raise ValueError(f"{operation}: {name} of shape {tuple(vector.shape)}, not ({length},)")
    if vector.dtype != dtype:
        raise TypeError(f"{operation}: {name} is {vector.dtype}, not {dtype}")


def check_matmul(x: torch.Tensor, w: GpuMatrix, out: torch.Tensor, bias: torch.Tensor | None) -> None:
    """x (tokens, columns), w one matrix, out (tokens, rows), bias (rows,) float32."""
    check_rows("matmul", x=x, out=out)
    if w.slots is not None or x.shape[1] != w.columns or out.shape != (x.shape[0], w.rows):
        raise ValueError(
            f"matmul: x {tuple(x.shape)}, {w.rows} x {w.columns} weights (slots: {w.slots}), out {tuple(out.shape)}"
        )
    check_vector("matmul", "bias", bias, w.rows, torch.float32)


def check_expert_matmul(
    x: torch.Tensor, w: GpuMatrix, segments: torch.Tensor, out: torch.Tensor, scales: torch.Tensor | None
) -> None:
    """x (pairs, columns), w a stack, segments (n, 4) int32, out (pairs, rows), scales float32."""
    check_rows("expert_matmul", x=x, out=out)
    if w.slots is None or x.shape[1] != w.columns or out.shape != (x.shape[0], w.rows):
        raise ValueError(
            f"expert_matmul: x {tuple(x.shape)}, {w.slots} slots of {w.rows} x {w.columns}, out {tuple(out.shape)}"
        )
    if segments.ndim != 2 or segments.shape[1] != 4 or not segments.is_contiguous():
        raise ValueError(f"expert_matmul: segments of shape {tuple(segments.shape)}, not (n, 4)")
    if segments.dtype != torch.int32:
        raise TypeError(f"expert_matmul: segments are {segments.dtype}, not int32")
    if scales is not None:
        check_vector("expert_matmul", "scales", scales, scales.numel(), torch.float32)


def check_gather(x: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
    """x (tokens, columns), index (pairs,) int32, out (pairs, columns)."""
    check_rows("gather_rows", x=x, out=out)
    check_vector("gather_rows", "index", index, out.shape[0], torch.int32)
    if out.shape[1] != x.shape[1]:
        raise ValueError(f"gather_rows: {x.shape[1]} columns into {out.shape[1]}")


def check_scatter(
    out: torch.Tensor, y: torch.Tensor, weights: torch.Tensor, token_of_pair: torch.Tensor, count: torch.Tensor
) -> None:
    """out (tokens, hidden), y (pairs, hidden), weights and token_of_pair (pairs,), count (1,)."""
    check_rows("scatter_add_weighted", out=out, y=y)
    check_vector("scatter_add_weighted", "weights", weights, y.shape[0], torch.float32)
    check_vector("scatter_add_weighted", "token_of_pair", token_of_pair, y.shape[0], torch.int32)
    check_vector("scatter_add_weighted", "count", count, 1, torch.int32)
    if out.shape[1] != y.shape[1]:
        raise ValueError(f"scatter_add_weighted: {y.shape[1]} columns into {out.shape[1]}")


def check_norm(operation: str, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, heads: int) -> None:
    """x and out alike, weight for one of `heads` parts."""
    check_same(operation, x=x, out=out)
    if heads < 1 or x.shape[1] % heads:
        raise ValueError(f"{operation}: {x.shape[1]} columns in {heads} heads")
    check_vector(operation, "weight", weight, x.shape[1] // heads, torch.float32)


def check_gate(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor, activation: str) -> None:
    """Three alike and a known activation."""
    check_same("gate", gate=gate, up=up, out=out)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is none of {', '.join(ACTIVATIONS)}")


def check_gated(out: torch.Tensor, x: torch.Tensor, gate: torch.Tensor) -> None:
    """Two alike, and a number a token."""
    check_same("add_gated", out=out, x=x)
    check_rows("add_gated", gate=gate)
    if gate.shape != (x.shape[0], 1):
        raise ValueError(f"add_gated: gate of shape {tuple(gate.shape)} for {x.shape[0]} tokens")


def check_heads(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    rotation: Rotation,
    cache: KVBlocks,
    lanes: Lanes,
    norms: tuple[torch.Tensor | None, torch.Tensor | None],
) -> None:
    """Activations that fit the cache, a position a token, both norms or none."""
    check_rows("heads", queries=queries, keys=keys, values=values)
    length, tokens = cache.key_length, queries.shape[0]
    lanes.tokens_each(tokens)
    if queries.shape[1] % length or keys.shape != (tokens, cache.kv_heads * length):
        raise ValueError(f"heads: queries {tuple(queries.shape)}, keys {tuple(keys.shape)} for heads of {length}")
    if values.shape != (tokens, cache.kv_heads * cache.value_length):
        raise ValueError(f"heads: values {tuple(values.shape)} for heads of {cache.value_length}")
    check_vector("heads", "positions", positions, tokens, torch.int32)
    if not 0 < 2 * rotation.pairs <= length:
        raise ValueError(f"heads: {rotation.pairs} pairs turn in heads of {length}")
    if (norms[0] is None) != (norms[1] is None):
        raise ValueError("heads: queries and keys are both normed, or neither")
    for name, norm in zip(("query_norm", "key_norm"), norms, strict=True):
        check_vector("heads", name, norm, length, torch.float32)


def check_attention(
    queries: torch.Tensor,
    cache: KVBlocks,
    lanes: Lanes,
    out: torch.Tensor,
    window: int | None,
    marks: torch.Tensor | None = None,
) -> None:
    """queries (tokens, heads * key_length), out (tokens, heads * value_length) and marks (tokens, 2 * heads), if any;
    heads in equal groups.
    """
    check_rows("attention", queries=queries, out=out)
    lanes.tokens_each(queries.shape[0])
    heads = queries.shape[1] // cache.key_length
    if queries.shape[1] % cache.key_length or out.shape != (queries.shape[0], heads * cache.value_length):
        raise ValueError(
            f"attention: queries {tuple(queries.shape)} and out {tuple(out.shape)} for {cache.keys.numbers.shape}"
        )
    if heads % cache.kv_heads:
        raise ValueError(f"attention: {heads} heads share {cache.kv_heads} KV heads")
    if window is not None and window < 1:
        raise ValueError(f"attention with a window of {window} tokens")
    if marks is not None and (marks.shape != (queries.shape[0], 2 * heads) or marks.dtype != torch.float32):
        raise ValueError(f"attention: marks {tuple(marks.shape)} of {marks.dtype} for {heads} heads")


def check_parts(out: torch.Tensor, marks: torch.Tensor, part: torch.Tensor) -> None:
    """out and marks alike in tokens, part (tokens, columns of both) float32."""
    check_rows("join_parts", out=out, marks=marks, part=part)
    tokens, columns = out.shape
    if marks.shape[0] != tokens or part.shape != (tokens, columns + marks.shape[1]):
        raise ValueError(f"join_parts: {tuple(part.shape)} to {tuple(out.shape)} and {tuple(marks.shape)}")
    if marks.shape[1] % 2 or columns % (marks.shape[1] // 2):
        raise ValueError(f"join_parts: {columns} columns for {marks.shape[1]} marks")
    if marks.dtype != torch.float32 or part.dtype != torch.float32:
        raise TypeError(f"join_parts: marks are {marks.dtype} and part {part.dtype}, not float32")


def check_chosen(operation: str, logits: torch.Tensor, values: torch.Tensor, ids: torch.Tensor) -> None:
    """logits (tokens, n), values (tokens, k) float32 and ids (tokens, k) int32 with k <= n."""
    check_rows(operation, logits=logits, values=values)
    tokens, most = logits.shape
    if values.shape != ids.shape or ids.shape[0] != tokens or not 0 < ids.shape[1] <= most or ids.stride(1) != 1:
        raise ValueError(
            f"{operation}: {tuple(ids.shape)} ids and {tuple(values.shape)} values of {tuple(logits.shape)}"
        )
    if ids.dtype != torch.int32 or values.dtype != torch.float32:
        raise TypeError(f"{operation}: ids are {ids.dtype} and values {values.dtype}, not int32 and float32")
