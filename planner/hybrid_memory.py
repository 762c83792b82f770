"""What a hybrid plan needs of RAM and of the GPU's memory wherever its parts lie: taken out of both beforehand.

The worst moment is the largest prefill chunk with the KV cache full. Knows nothing about time. Sizes are bytes; where
a figure varies, what is reserved lies above it.
"""

from dataclasses import replace

from planner.budget import MIB, Budget
from planner.gpu_choice import is_simulated
from planner.hybrid_parts import FLOAT32_BYTES
from planner.memory import (
    GPU_PROCESS_BYTES,
    GPU_PROCESS_RAM_BYTES,
    PACKED_BUFFERS_BYTES,
    PACKED_PROCESS_BYTES,
    packed_activations_bytes,
    vocabulary_bytes,
)
from planner.model_shape import ModelShape
from planner.plan import MemoryNeeds, Needs

TORCH_BYTES = 130 * MIB  # of RAM, beside what the programs for the CPU need
RING_BYTES = 64 * MIB  # pinned buffers that weights cross the link in
STAGING_BYTES = 8 * MIB  # of the GPU's memory: where raw blocks land before they are arranged, dense and experts'
ROUNDING = 1.05  # rows are rounded up to 64 bytes
TABLES_BYTES = 256 << 10  # positions, blocks, and which experts' rows are whose
KV_BLOCK_TOKENS = 64  # by which a sequence's cache on the GPU grows
SEQUENCES = 8  # that run together, each of which may leave the better part of a block unused


def reserved(shape: ModelShape, budget: Budget, device: str, *, context_tokens: int, chunk_tokens: int) -> Needs:
    """All that is needed but weights, slots and KV cache.

    The GPU's activations are reserved first, so that no prompt can run out of memory for them. A simulated GPU's memory
    is RAM, which `with_gpu_in_ram` adds.
    """
    tokens = min(chunk_tokens, context_tokens)
    activations = packed_activations_bytes(shape, tokens)
    simulated = is_simulated(device)
    ram = MemoryNeeds(
        activations_bytes=activations + crossing_bytes(shape, tokens),
        buffers_bytes=PACKED_BUFFERS_BYTES + RING_BYTES,
        vocabulary_bytes=vocabulary_bytes(shape, activations),
        process_bytes=PACKED_PROCESS_BYTES + TORCH_BYTES if simulated else GPU_PROCESS_RAM_BYTES,
        margin_bytes=budget.ram_margin_bytes,
    )
    gpu = MemoryNeeds(
        activations_bytes=gpu_activations_bytes(shape, tokens, context_tokens),
        buffers_bytes=min(STAGING_BYTES, max((unit.num_bytes for unit in shape.units), default=0)),
        process_bytes=0 if simulated else GPU_PROCESS_BYTES,
        margin_bytes=budget.gpu_margin_bytes,
    )
    return Needs(ram=ram, gpu=gpu)


def gpu_activations_bytes(shape: ModelShape, tokens: int, context_tokens: int) -> int:
    """What the GPU's operations pass on to each other in a chunk of so many tokens, float32.

    Of a token: residual, norms and heads; gate and up; of every expert used what goes in and what comes out; the
    logits of the tokens that want them; cosines and sines of all positions.
    """
    angles = 2 * FLOAT32_BYTES * context_tokens * _head_length(shape)
    return int(ROUNDING * packed_activations_bytes(shape, tokens)) + angles + TABLES_BYTES


def crossing_bytes(shape: ModelShape, tokens: int) -> int:
    """Pinned RAM in which a chunk's hidden states cross the link, in both directions, with what routers decided."""
    return FLOAT32_BYTES * tokens * (4 * shape.embedding_length + 4 * shape.expert_used_count) + (
        FLOAT32_BYTES * SEQUENCES * shape.vocab_size
    )


def kv_tokens(context_tokens: int) -> int:
    """Tokens of a layer's cache on the GPU that hold `context_tokens`, in blocks of which sequences take whole ones."""
    blocks = -(-context_tokens // KV_BLOCK_TOKENS)
    return KV_BLOCK_TOKENS * (blocks + min(SEQUENCES - 1, blocks - 1))


def with_gpu_in_ram(needs: Needs, device: str) -> Needs:
    """`needs`, with the memory of a simulated GPU counted where it lies: in RAM."""
    if not is_simulated(device):
        return needs
    ram = needs.ram
    return replace(needs, ram=replace(ram, process_bytes=ram.process_bytes + needs.gpu.peak_bytes))


def _head_length(shape: ModelShape) -> int:
    return shape.embedding_length // max(shape.head_count, 1)
