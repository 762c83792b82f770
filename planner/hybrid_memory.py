"""What a hybrid plan needs of RAM and of the GPU's memory wherever its parts lie: taken out of both beforehand.

The worst moment is the largest prefill chunk with the KV cache full. Knows nothing about time. Sizes are bytes; where
a figure varies, what is reserved lies above it.
"""

from collections.abc import Iterator
from dataclasses import replace

from cpu_kernels.kv_layout import PIECE_TOKENS
from offload.tiers import Device
from planner.budget import GPU_PROCESS_RAM_BYTES, MIB, PACKED_PROCESS_BYTES, Budget
from planner.gpu_choice import is_simulated
from planner.hybrid_parts import FLOAT32_BYTES, gpu_bytes, parts
from planner.hybrid_split import Split
from planner.memory import (
    GPU_PROCESS_BYTES,
    PACKED_BUFFERS_BYTES,
    PROGRAM_LOGITS_TOKENS,
    angles_bytes,
    packed_activations_bytes,
    vocabulary_bytes,
)
from planner.model_shape import ModelShape, UnitKind
from planner.plan import MemoryNeeds, Needs

TORCH_BYTES = 130 * MIB  # of RAM, beside what the programs for the CPU need
RING_BYTES = 64 * MIB  # pinned buffers that weights cross the link in
STAGING_BYTES = 4 * MIB  # of the GPU's memory while dense weights are loaded: where raw blocks land
TRANSFER_BUFFERS, TRANSFER_BYTES = 4, MIB  # the same for experts, for good: `offload.transfer`
LARGEST_MATRIX = 1 / 2  # of the bytes of an expert or of a layer's part, at most
COLUMNS = 16  # to a multiple of which rows are rounded up
LEAST_ROWS = 64  # of every matrix of activations: so many sequences may go on together
ANGLES = 3  # of a position as many as a head has numbers, for two ways to turn, one of which is being replaced
TABLES_BYTES = 64 << 10  # positions, blocks, and which experts' rows are whose
KV_BLOCK_TOKENS = 64  # by which a sequence's cache on the GPU grows
KV_SHARES = (3 / 4, 1 / 2, 1 / 4, 1 / 8)  # of the context that the GPU might hold where it cannot hold all
SEQUENCES = 8  # that run together, each of which may leave the better part of a block unused


def reserved(
    shape: ModelShape, budget: Budget, device: str, *, context_tokens: int, chunk_tokens: int, in_parts: bool = False
) -> Needs:
    """All that is needed but weights, slots and KV cache; `in_parts`: caches of the GPU's layers lie in part in RAM.

    The GPU's activations are reserved first, so that no prompt can run out of memory for them. A simulated GPU's memory
    is RAM, which `with_gpu_in_ram` adds.
    """
    tokens = min(chunk_tokens, context_tokens)
    activations = packed_activations_bytes(shape, tokens)
    simulated = is_simulated(device)
    ram = MemoryNeeds(
        activations_bytes=activations + crossing_bytes(shape, tokens, in_parts=in_parts),
        buffers_bytes=PACKED_BUFFERS_BYTES + RING_BYTES + angles_bytes(shape, context_tokens),
        vocabulary_bytes=vocabulary_bytes(shape, activations),
        process_bytes=PACKED_PROCESS_BYTES + TORCH_BYTES if simulated else GPU_PROCESS_RAM_BYTES,
        margin_bytes=budget.ram_margin_bytes,
    )
    on_gpu = gpu_activations_bytes(shape, tokens, context_tokens, in_parts=in_parts)
    gpu = MemoryNeeds(
        activations_bytes=on_gpu,
        buffers_bytes=buffers_bytes(shape, None, on_gpu),
        process_bytes=0 if simulated else GPU_PROCESS_BYTES,
        margin_bytes=budget.gpu_margin_bytes,
    )
    return Needs(ram=ram, gpu=gpu)


def gpu_activations_bytes(
    shape: ModelShape, tokens: int, context_tokens: int, split: Split | None = None, *, in_parts: bool = False
) -> int:
    """What the GPU's operations pass on to each other in a chunk of so many tokens, float32; None: all parts' there.

    Of a token residual, norms and heads; gate and up; of every expert used what goes in and what comes out. The logits
    of the tokens that want them; cosines and sines of all positions. `in_parts`: what the CPU attended, too.
    """
    hidden, rows = shape.embedding_length, max(tokens, LEAST_ROWS)
    columns, others = [hidden] * 3, TABLES_BYTES
    if split is None or split.attention:
        columns += _attention_columns(shape)
        columns += _part_columns(shape) if in_parts else []
        others += ANGLES * FLOAT32_BYTES * context_tokens * _head_length(shape)
    if split is None or split.feed_forward:
        columns += _feed_forward_columns(shape, has_slots=split is None or split.slots > 0)
    if split is None or split.output:
        others += FLOAT32_BYTES * PROGRAM_LOGITS_TOKENS * shape.vocab_size
    return FLOAT32_BYTES * rows * sum(-(-count // COLUMNS) * COLUMNS for count in columns) + others


def buffers_bytes(shape: ModelShape, split: Split | None, later_bytes: int) -> int:
    """Of the GPU's memory: what experts pass through, and what dense weights do as far as it exceeds `later_bytes`.

    Those are what is only had when dense weights are there. None: all parts are there.
    """
    expert, staged = 0, 0
    for part in parts(shape):
        for unit in part.units:
            if unit.kind is UnitKind.EXPERTS and shape.expert_count:
                expert = max(expert, int(LARGEST_MATRIX * unit.num_bytes / shape.expert_count))
            elif part.may_be_on_gpu and (split is None or split.device(part) is Device.GPU):
                share = LARGEST_MATRIX if unit.num_matmuls > 1 else 1
                staged = max(staged, int(share * gpu_bytes(unit)))
    is_routed = split is None or split.cached_layers(shape) | split.resident
    transfer = TRANSFER_BUFFERS * min(TRANSFER_BYTES, expert) if is_routed else 0
    return transfer + max(min(STAGING_BYTES, staged) + TABLES_BYTES - later_bytes - transfer, 0)


def crossing_bytes(shape: ModelShape, tokens: int, *, in_parts: bool = False) -> int:
    """Pinned RAM in which a chunk's hidden states cross the link, in both directions, with what routers decided."""
    columns = 4 * shape.embedding_length + 4 * shape.expert_used_count
    if in_parts:
        columns += sum(_attention_columns(shape)) + sum(_part_columns(shape))
    return FLOAT32_BYTES * tokens * columns + FLOAT32_BYTES * SEQUENCES * shape.vocab_size


def kv_tokens(context_tokens: int, most_tokens: int | None = None) -> int:
    """Tokens of a layer's cache on the GPU for `context_tokens`, in blocks of which sequences take whole ones.

    `most_tokens`: that it may hold, the others being in RAM.
    """
    if most_tokens is not None:
        return most_tokens
    blocks = -(-context_tokens // KV_BLOCK_TOKENS)
    return KV_BLOCK_TOKENS * (blocks + min(SEQUENCES - 1, blocks - 1))


def ram_kv_tokens(context_tokens: int, most_tokens: int | None) -> int:
    """Tokens of a GPU layer's cache that lie in RAM where the GPU may hold so many: whole pieces."""
    if most_tokens is None:
        return 0
    return PIECE_TOKENS * -(-max(context_tokens - most_tokens, 0) // PIECE_TOKENS)


def kv_limits(context_tokens: int, chunk_tokens: int) -> Iterator[int]:
    """How many tokens of each cache the GPU might hold where it cannot hold all: less and less, in whole pieces.

    At least the piece that a chunk begins in, and the chunk.
    """
    least = PIECE_TOKENS * (1 + -(-chunk_tokens // PIECE_TOKENS))
    for share in KV_SHARES:
        tokens = int(share * context_tokens) // PIECE_TOKENS * PIECE_TOKENS
        if tokens >= least:
            yield tokens


def with_gpu_in_ram(needs: Needs, device: str) -> Needs:
    """`needs`, with the memory of a simulated GPU counted where it lies: in RAM."""
    if not is_simulated(device):
        return needs
    ram = needs.ram
    return replace(needs, ram=replace(ram, process_bytes=ram.process_bytes + needs.gpu.peak_bytes))


def _attention_columns(shape: ModelShape) -> list[int]:
    """Of queries, keys and values side by side, and of what attention makes of them."""
    widths = [(0, 0)]
    for unit in shape.units:
        if unit.kind is UnitKind.ATTENTION and unit.layer is not None:
            cached = shape.kv_numbers(unit.layer)
            # a layer's weights are those of queries, of the output, which is as wide, and of what is cached
            heads = max(unit.num_weights // shape.embedding_length - cached, 0) // 2
            widths.append((heads + cached, heads))
    return [max(width[part] for width in widths) for part in range(2)]


def _part_columns(shape: ModelShape) -> list[int]:
    """Of what the CPU attended, and of what weight that and the GPU's own part have."""
    return [_attention_columns(shape)[1] + 2 * shape.head_count, 2 * shape.head_count]


def _feed_forward_columns(shape: ModelShape, *, has_slots: bool) -> list[int]:
    """Of a dense layer's gate and up; or of a router, a shared expert and, where some are there, a token's experts."""
    inner = 2 * shape.feed_forward_length
    if not shape.expert_count:
        return [inner]
    hidden, used = shape.embedding_length, shape.expert_used_count
    columns = [shape.expert_count, 4 * used, *([inner, *2 * used * [hidden]] if has_slots else [])]
    shared = [unit.num_weights for unit in shape.units if unit.kind is UnitKind.SHARED_EXPERT]
    return [*columns, 2 * max(shared) // (3 * hidden), hidden, 1] if shared else columns


def _head_length(shape: ModelShape) -> int:
    return shape.embedding_length // max(shape.head_count, 1)
