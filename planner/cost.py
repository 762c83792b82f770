"""How long prefill and decode will take: bytes and operations of a model over the rates of a profile.

The first form of the cost model, for one loop that computes unit after unit on one device: times add up. Knows
nothing about memory limits. Decode is bound by reading every active weight once a token (a roofline with arithmetic
intensity 2 operations a weight); prefill by arithmetic or, for short prompts, by reading the weights once a chunk.
What the constants leave over is corrected by the ratio of measured to predicted time of earlier runs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from planner import streamed
from planner.gpu_choice import is_simulated
from planner.hybrid_hits import evened_slots, gpu_hits_key, slots_of_both
from planner.kv_spill import Spilling, reading_seconds, spilled_seconds
from planner.machine_here import OPERATION_S
from planner.memory import FLOAT32_BYTES, weights_bytes
from planner.model_shape import ModelShape, Unit, UnitKind
from planner.packed_pass import pass_seconds
from planner.plan import Needs, Plan, PlannedModel, Settings, WeightsForm
from planner.prediction import Bottleneck, Measurement, Prediction
from planner.profile import Profile, load_or_measure
from planner.profile_learned import record_hits, record_observation
from planner.streamed import Streaming
from planner.ways import HYBRID

# Calls into the tensor library, counted in the sequential loop: of each part, each norm or bias in it, each product.
PART_OPERATIONS = {
    UnitKind.EMBEDDING: 4,
    UnitKind.ATTENTION: 48,
    UnitKind.DENSE_FFN: 4,
    UnitKind.ROUTER: 12,
    UnitKind.SHARED_EXPERT: 8,
    UnitKind.OUTPUT: 4,
}
EXPERT_OPERATIONS = 13
VECTOR_OPERATIONS = 6
PRODUCT_OPERATIONS = 3
DEQUANTIZE_OPERATIONS = 20  # of each product whose matrix is made float32 first
# The sequential loop against the profile, on one and two threads of an AMD EPYC (family 26):
OPERATION_COST = 1.5  # a call of torch takes 1.3 to 1.6 us, one of numpy 0.85 to 1.1 us
MATVEC_SHARE = 0.7  # torch's product of one row runs at 19 GB/s, the profile's dot products at 27 GB/s
MATMUL_SHARE = 0.8  # a whole chunk, with what lies between the products, over the products alone
KV_READS = 8  # the cache is read, made float32, written and read again: 4.2 GB/s where RAM gives 35 GB/s
SCORE_BYTES = 300  # one attention score in prefill, masked and through softmax: 8.5 ns, as bytes read
SAMPLED_S = 4e-9  # a token of the vocabulary, when one of them is chosen
PACKED_LAYER_ROWS = 16
PACKED_FIRST_STEP_S = 2e-3  # the demo's first token of a new sequence takes 2.4 ms, 0.1 ms of it in operations
LEAST_DECODED_TOKENS = 16  # that decoding is learned from
LEAST_PROMPT_TOKENS = 32  # that prefill is learned from: below, it is the first step's warming up that is measured
# The first step of a process over the same step again: 6.5 ms instead of 2.5 ms for a prompt of 4 tokens.
FIRST_STEP_S = 4e-3
MOST_CHUNKS = 64  # of a prompt whose seconds are worked out
ANSWER_TOKENS = 128  # of the answer that the decode speed is predicted for


@dataclass(frozen=True, slots=True)
class _Rates:
    """The rates of the device that computes."""

    matvec_bytes_per_s: float
    read_bytes_per_s: float
    flops_per_s: float
    op_s: float
    bandwidth: Bottleneck


def decode_seconds(
    shape: ModelShape,
    profile: Profile,
    settings: Settings,
    kv_tokens: int,
    streaming: Streaming | None = None,
    spilling: Spilling | None = None,
) -> Mapping[Bottleneck, float]:
    """Seconds of one decode step behind `kv_tokens` tokens, by the resource that takes them; uncorrected."""
    rates = _rates(shape, profile, settings)
    if settings.weights_form is WeightsForm.PACKED:
        return packed_step_seconds(shape, profile, settings, 1, kv_tokens, streaming, spilling)
    units = [unit for unit in shape.units if unit.kind is not UnitKind.EMBEDDING]
    products = FLOAT32_BYTES * sum(unit.active_weights for unit in units) / rates.matvec_bytes_per_s
    kv = KV_READS * shape.kv_bytes_per_token * kv_tokens / rates.read_bytes_per_s
    operations = sum(_operations(shape, unit, settings.weights_form, 1) for unit in shape.units)
    seconds = {rates.bandwidth: products + kv, Bottleneck.OVERHEAD: rates.op_s * operations}
    if settings.weights_form is WeightsForm.QUANTISED:
        seconds[Bottleneck.DEQUANTISATION] = sum(_dequantize_seconds(profile, shape, unit, 1) for unit in shape.units)
    return seconds


def prefill_seconds(
    shape: ModelShape,
    profile: Profile,
    settings: Settings,
    prompt_tokens: int,
    streaming: Streaming | None = None,
    spilling: Spilling | None = None,
) -> float:
    """Seconds until the logits behind a prompt of `prompt_tokens` tokens are there; uncorrected."""
    rates = _rates(shape, profile, settings)
    if settings.weights_form is WeightsForm.PACKED:
        return PACKED_FIRST_STEP_S + sum(
            alike * sum(packed_step_seconds(shape, profile, settings, tokens, start, streaming, spilling).values())
            for start, tokens, alike in _chunks(prompt_tokens, settings.prefill_chunk_tokens)
        )
    blocks = [unit for unit in shape.units if unit.layer is not None]
    ends = [unit for unit in shape.units if unit.layer is None]
    seconds = FIRST_STEP_S
    for start in range(0, prompt_tokens, settings.prefill_chunk_tokens):
        tokens = min(settings.prefill_chunk_tokens, prompt_tokens - start)
        scores = shape.head_count * shape.block_count * tokens * (start + (tokens + 1) / 2)
        arithmetic = 2 * tokens * sum(unit.active_weights for unit in blocks)
        touched = sum(unit.num_weights * _touched_share(shape, unit, tokens) for unit in blocks)
        seconds += max(arithmetic / rates.flops_per_s, FLOAT32_BYTES * touched / rates.matvec_bytes_per_s)
        seconds += SCORE_BYTES * scores / rates.read_bytes_per_s
        seconds += rates.op_s * sum(_operations(shape, unit, settings.weights_form, tokens) for unit in shape.units)
        if settings.weights_form is WeightsForm.QUANTISED:
            seconds += sum(_dequantize_seconds(profile, shape, unit, tokens) for unit in blocks)
    head = sum(unit.active_weights for unit in ends if unit.kind is not UnitKind.EMBEDDING)
    if settings.weights_form is WeightsForm.QUANTISED:
        seconds += sum(_dequantize_seconds(profile, shape, unit, 1) for unit in ends)
    return seconds + FLOAT32_BYTES * head / rates.matvec_bytes_per_s


def packed_step_seconds(
    shape: ModelShape,
    profile: Profile,
    settings: Settings,
    tokens: int,
    depth: int,
    streaming: Streaming | None = None,
    spilling: Spilling | None = None,
) -> Mapping[Bottleneck, float]:
    """The same for weights multiplied as they are in the file: `tokens` tokens behind `depth` others."""
    seconds, experts_s = pass_seconds(shape, profile, settings, tokens, depth)
    seconds += SAMPLED_S * shape.vocab_size
    if streaming is not None:
        ahead = 0.0 if spilling is None else reading_seconds(shape, spilling, depth + tokens - 1, tokens)
        beside = {"experts_s": experts_s, "read_ahead_s": ahead}
        return streamed.step_seconds(shape, seconds, streaming, settings, tokens, **beside)
    overhead = OPERATION_S * PACKED_LAYER_ROWS * (shape.block_count + 1)
    bandwidth = Bottleneck.RAM_BANDWIDTH if settings.device == "cpu" else Bottleneck.GPU_BANDWIDTH
    parts = {bandwidth: max(seconds - overhead, 0.0), Bottleneck.OVERHEAD: overhead}
    return parts if spilling is None else spilled_seconds(shape, parts, spilling, depth + tokens - 1, tokens)


def _chunks(prompt_tokens: int, chunk_tokens: int) -> Iterator[tuple[int, int, int]]:
    """(first token, tokens, how many are alike) of a prompt's chunks; of many some stand for their neighbors."""
    starts = range(0, prompt_tokens, chunk_tokens)
    step = ceil(len(starts) / MOST_CHUNKS)
    for index in range(0, len(starts), step):
        alike = starts[index : index + step]
        start = alike[(len(alike) - 1) // 2]
        yield start, min(chunk_tokens, prompt_tokens - start), len(alike)


def predict(
    shape: ModelShape,
    profile: Profile,
    *,
    model: PlannedModel,
    settings: Settings,
    needs: Needs,
    prompt_tokens: int,
    streaming: Streaming | None = None,
    spilling: Spilling | None = None,
) -> Prediction:
    """What a plan promises for a prompt of `prompt_tokens` and an answer of 128 tokens, corrected by earlier runs."""
    answer_tokens = min(ANSWER_TOKENS, max(settings.context_tokens - prompt_tokens, 0))
    parts = decode_seconds(shape, profile, settings, prompt_tokens + answer_tokens // 2, streaming, spilling)
    bottleneck = max(parts, key=lambda part: parts[part])
    decode = profile.residual(correction_keys("decode", model, settings, bottleneck))
    prefill = profile.residual(correction_keys("prefill", model, settings, bottleneck))
    ttft_s = prefill_seconds(shape, profile, settings, prompt_tokens, streaming, spilling) * prefill.factor
    return Prediction(
        decode_tokens_per_s=1 / (sum(parts.values()) * decode.factor),
        prefill_tokens_per_s=prompt_tokens / ttft_s,
        ttft_s=ttft_s,
        peak_ram_bytes=needs.ram.peak_bytes,
        peak_gpu_bytes=needs.gpu.peak_bytes,
        bottleneck=bottleneck,
        prompt_tokens=prompt_tokens,
        decode_correction=decode,
        prefill_correction=prefill,
        hit_rate=streaming.curve.hit_rate(settings.stream_slots) if streaming and model.expert_count else None,
    )


def record_run(plan: Plan, measured: Measurement, path: Path | None = None) -> Profile:
    """Correct the stored profile by what a run by `plan` measured: for this model, and for this way of running any.

    Reading the prompt is learned from only where it has 32 tokens or more and the plan was predicted for its length,
    decoding only from 16 tokens on: of fewer it is the machine's waking up that is measured.
    """
    profile, predicted = load_or_measure(path), plan.predicted
    slots, key = plan.settings.stream_slots, plan.model.key
    if plan.settings.loop == HYBRID:
        slots, key = evened_slots(plan), gpu_hits_key(plan.model)
        if measured.found_rate is not None and (both := slots_of_both(plan)):
            profile = record_hits(profile, plan.model.key, both, measured.found_rate, path)
    if measured.hit_rate is not None and slots:
        is_first = key not in profile.hits
        profile = record_hits(profile, key, slots, measured.hit_rate, path)
        if is_first:  # what else was off is told by the next run, whose hits are foreseen
            return profile
    is_enough = measured.decoded_tokens is None or measured.decoded_tokens >= LEAST_DECODED_TOKENS
    if measured.decode_tokens_per_s and is_enough:
        profile = record_observation(
            profile,
            correction_keys("decode", plan.model, plan.settings, predicted.bottleneck),
            predicted_s=1 / predicted.decode_tokens_per_s / predicted.decode_correction.factor,
            measured_s=1 / measured.decode_tokens_per_s,
            path=path,
        )
    as_predicted = measured.prompt_tokens == predicted.prompt_tokens >= LEAST_PROMPT_TOKENS
    if measured.ttft_s and as_predicted:
        profile = record_observation(
            profile,
            correction_keys("prefill", plan.model, plan.settings, predicted.bottleneck),
            predicted_s=predicted.ttft_s / predicted.prefill_correction.factor,
            measured_s=measured.ttft_s,
            path=path,
        )
    return profile


def correction_keys(phase: str, model: PlannedModel, settings: Settings, bottleneck: Bottleneck) -> tuple[str, str]:
    """Where corrections are kept, first for this model, then for all that run the same way and are bound alike."""
    device = settings.device if is_simulated(settings.device) else settings.device.partition(":")[0]
    way = f"{phase}/{settings.loop}/{settings.weights_form.value}/{device}"
    if settings.stream_slots:
        way += "/streamed"
    if settings.kv_ram_bytes is not None:
        way += "/spilled"
    return f"{way}/{settings.threads} threads/{model.key}", f"{way}/{bottleneck.value}"


def _rates(shape: ModelShape, profile: Profile, settings: Settings) -> _Rates:
    if settings.device != "cpu" and profile.gpu is not None:
        gpu = profile.gpu
        rate = gpu.matvec_bytes_per_s
        return _Rates(rate, rate, gpu.matmul_flops_per_s, gpu.op_overhead_s, Bottleneck.GPU_BANDWIDTH)
    threads = settings.threads
    matvec = profile.matvec_rate(weights_bytes(shape, WeightsForm.FLOAT32), threads)
    in_cache = matvec > 1.25 * profile.matvec_rate(profile.matvec[-1].at, threads)
    return _Rates(
        matvec_bytes_per_s=MATVEC_SHARE * matvec,
        read_bytes_per_s=profile.read_rate(threads),
        flops_per_s=MATMUL_SHARE * profile.matmul_flops_per_s * min(threads / profile.threads, 1.0),
        op_s=OPERATION_COST * profile.op_overhead_s,
        bandwidth=Bottleneck.COMPUTE if in_cache else Bottleneck.RAM_BANDWIDTH,
    )


def _touched_share(shape: ModelShape, unit: Unit, tokens: int) -> float:
    """Share of a unit's weights that `tokens` tokens read together, experts being drawn evenly."""
    if unit.kind is not UnitKind.EXPERTS or not shape.expert_count:
        return 1.0
    return float(1 - (1 - shape.expert_used_count / shape.expert_count) ** tokens)


def _operations(shape: ModelShape, unit: Unit, form: WeightsForm, tokens: int) -> float:
    """Calls into the tensor library that a unit costs in a step of `tokens` tokens."""
    product = PRODUCT_OPERATIONS + (DEQUANTIZE_OPERATIONS if form is WeightsForm.QUANTISED else 0)
    if unit.kind is UnitKind.EXPERTS:
        touched = ceil(shape.expert_count * _touched_share(shape, unit, tokens))
        return touched * (EXPERT_OPERATIONS + product * unit.num_matmuls / max(shape.expert_used_count, 1))
    return PART_OPERATIONS.get(unit.kind, 0) + VECTOR_OPERATIONS * unit.num_vectors + product * unit.num_matmuls


def _dequantize_seconds(profile: Profile, shape: ModelShape, unit: Unit, tokens: int) -> float:
    """Seconds to make float32 of the weights of a unit that `tokens` tokens read."""
    active_share = shape.expert_used_count / shape.expert_count if unit.kind is UnitKind.EXPERTS else 1.0
    scale = _touched_share(shape, unit, tokens) / active_share if active_share else 0.0
    rates = profile.dequantize_bytes_per_s
    return scale * sum(num_bytes / rates[name] for name, num_bytes in unit.active_bytes_by_type)
