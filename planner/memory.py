"""What a plan needs of each memory at its worst moment: the largest prefill chunk with the KV cache full.

Knows the sizes of what the executor holds, nothing about time. The constants below were measured and are stated with
their source; where the true figure varies, they lie above it: a plan may promise too little room, never too much.
"""

from dataclasses import replace

from cpu_kernels.quant_types import quant_type
from offload.tiers import Device
from planner.budget import GPU_PROCESS_RAM_BYTES, MIB, PACKED_PROCESS_BYTES, Budget
from planner.model_shape import PREFILL_TOKENS, ModelShape, Unit
from planner.plan import MemoryNeeds, Needs, WeightsForm

# Python, numpy, torch and what the command imports: 222 MiB resident on Linux before a model is loaded (torch 2.13).
PROCESS_BYTES = 250 * MIB
GPU_PROCESS_BYTES = 768 * MIB  # of the GPU's memory, with a CUDA context; not measured by us, taken with room
# By scripts/measure_vocabulary.py and twelve vocabularies of llama.cpp's: 165 to 382 bytes a token and up to 195 a
# merge once it is built, up to 5 MiB for the patterns of words; up to 205 a merge more while it is built.
VOCABULARY_BYTES = 4 * MIB
VOCABULARY_BYTES_PER_TOKEN = 420
VOCABULARY_BYTES_PER_MERGE = 200
BUILDING_BYTES_PER_MERGE = 220
UNIT_WEIGHTS = 1 << 24  # that the executor makes float32 at a time
ATTENTION_SCORES = 1 << 24  # that the executor holds at a time, in three copies
MASK_BYTES = 20  # of each pair of a query and a key: two distances in 64 bits, and what is hidden
FLOAT32_BYTES = 4
HALF_BYTES = 2
PACKED_BUFFERS_BYTES = 40 * MIB  # beside `PACKED_PROCESS_BYTES`
PROGRAM_CHUNK_TOKENS = PREFILL_TOKENS
PROGRAM_LOGITS_TOKENS = 16
# Bits a weight of types whose panels are larger than the file's blocks; others take the file's bytes.
PACKED_BITS = {
    "IQ1_S": 3.3125,
    "IQ1_M": 3.3125,
    "IQ2_XXS": 3.3125,
    "IQ2_XS": 3.3125,
    "IQ2_S": 3.3125,
    "IQ3_XXS": 4.3125,
    "IQ3_S": 4.3125,
}


def weights_bytes(shape: ModelShape, form: WeightsForm) -> int:
    """Bytes of all weights held in `form`."""
    if form is WeightsForm.FLOAT32:
        return FLOAT32_BYTES * shape.num_parameters
    if form is WeightsForm.QUANTISED:
        return shape.num_bytes
    extra = (
        num_weights * max(PACKED_BITS[name] - quant_type(name).bits_per_weight, 0) / 8
        for name, num_weights in shape.weights_by_type
        if name in PACKED_BITS
    )
    return shape.num_bytes + int(sum(extra))


def packed_bytes(unit: Unit) -> int:
    """Bytes of a unit's weights in panels."""
    scale = unit.num_bytes / max(unit.active_bytes, 1)
    return int(
        scale
        * sum(
            num_bytes * max(PACKED_BITS.get(name, 0.0) / quant_type(name).bits_per_weight, 1.0)
            for name, num_bytes in unit.active_bytes_by_type
        )
    )


def packed_activations_bytes(shape: ModelShape, tokens: int) -> int:
    """Bytes of what the programs' operations pass on to each other, for a chunk of so many tokens.

    Of a token: residual, norms and heads; gate and up; of every expert used what goes in and what comes out; and of
    gate, up and experts' rows, in a quarter as many numbers, the int8 copies. Workspaces of one layer with 256 tokens:
    69 MB at OLMoE's shape, where this gives 83, 37 MB at Llama 1B's, where it gives 47, both without the copies.
    """
    wide = shape.feed_forward_length + shape.expert_used_count * shape.embedding_length
    hidden = tokens * (8 * shape.embedding_length + 5 * wide // 2)
    return FLOAT32_BYTES * (hidden + (PROGRAM_LOGITS_TOKENS + 2) * shape.vocab_size)


def angles_bytes(shape: ModelShape, context_tokens: int) -> int:
    """Bytes of the cosines and sines of all positions, float32."""
    return FLOAT32_BYTES * context_tokens * max((heads.key_length for heads in shape.kv_heads), default=0)


def activations_bytes(shape: ModelShape, context_tokens: int, chunk_tokens: int) -> int:
    """Bytes of what one prefill chunk computes at the end of a full context, float32."""
    tokens = min(chunk_tokens, context_tokens)
    heads = max(shape.head_count, 1)
    pairs = min(tokens * context_tokens, max(ATTENTION_SCORES // heads, context_tokens))  # of a query and a key
    hidden = 8 * tokens * shape.embedding_length
    ffn = 3 * tokens * shape.feed_forward_length
    scores = 3 * pairs * heads
    keys_values = context_tokens * max(shape.kv_bytes_per_layer, default=0) // HALF_BYTES  # float16
    logits = 8 * shape.vocab_size
    return FLOAT32_BYTES * (hidden + ffn + scores + keys_values + logits) + MASK_BYTES * pairs


def buffers_bytes(shape: ModelShape, device: Device) -> int:
    """Bytes of RAM while the largest tensor is read and made float32, and on its way to a GPU as a whole."""
    unit = min(UNIT_WEIGHTS, shape.largest_tensor_weights)
    whole = shape.largest_tensor_weights if device is Device.GPU else 0
    return 2 * FLOAT32_BYTES * unit + FLOAT32_BYTES * whole


def vocabulary_bytes(shape: ModelShape, later_bytes: int) -> int:
    """Bytes of the tokenizer. What it takes more while it is built counts where it exceeds the `later_bytes`."""
    held = VOCABULARY_BYTES_PER_TOKEN * shape.vocab_size + VOCABULARY_BYTES_PER_MERGE * shape.merge_count
    return VOCABULARY_BYTES + held + max(BUILDING_BYTES_PER_MERGE * shape.merge_count - later_bytes, 0)


def memory_needs(
    shape: ModelShape, budget: Budget, device: Device, form: WeightsForm, *, context_tokens: int, chunk_tokens: int
) -> Needs:
    """Bytes of RAM and GPU memory with all weights in `form` beside `device`."""
    is_packed = form is WeightsForm.PACKED
    held = MemoryNeeds(
        weights_bytes=weights_bytes(shape, form),
        kv_bytes=shape.kv_bytes_per_token * context_tokens + shape.kv_window_bytes,
        activations_bytes=packed_activations_bytes(shape, min(PROGRAM_CHUNK_TOKENS, context_tokens))
        if is_packed
        else activations_bytes(shape, context_tokens, chunk_tokens),
    )
    buffers = PACKED_BUFFERS_BYTES + angles_bytes(shape, context_tokens) if is_packed else buffers_bytes(shape, device)
    if form is WeightsForm.FLOAT32:  # needed while loading alone, when nothing is computed yet
        buffers = max(buffers - held.kv_bytes - held.activations_bytes, 0) if device is Device.CPU else buffers
    vocabulary = vocabulary_bytes(shape, held.peak_bytes + buffers if device is Device.CPU else 0)
    ram_margin, gpu_margin = budget.ram_margin_bytes, budget.gpu_margin_bytes
    if device is Device.CPU:
        ram = replace(
            held,
            buffers_bytes=buffers,
            vocabulary_bytes=vocabulary,
            process_bytes=PACKED_PROCESS_BYTES if is_packed else PROCESS_BYTES,
            margin_bytes=ram_margin,
        )
        return Needs(ram=ram, gpu=MemoryNeeds())
    ram = MemoryNeeds(
        buffers_bytes=buffers,
        vocabulary_bytes=vocabulary,
        process_bytes=GPU_PROCESS_RAM_BYTES,
        margin_bytes=ram_margin,
    )
    return Needs(ram=ram, gpu=replace(held, process_bytes=GPU_PROCESS_BYTES, margin_bytes=gpu_margin))


def fits(needs: Needs, budget: Budget) -> bool:
    """Whether `needs` are within `budget` in both memories."""
    return needs.ram.needed_bytes <= budget.ram_bytes and needs.gpu.needed_bytes <= budget.gpu_bytes
