"""How fast a hybrid plan will be: the simulated steps of one token of the answer and of the chunks of the prompt.

Corrected, as every prediction, by what earlier runs of the same kind measured. Knows nothing about how a plan is found.
"""

from planner.binding import bottleneck
from planner.cost import ANSWER_TOKENS, PACKED_FIRST_STEP_S, correction_keys
from planner.hybrid_spill import host_lost_seconds
from planner.hybrid_step import HybridRun
from planner.kv_spill import Spilling
from planner.plan import Needs, PlannedModel, Settings
from planner.prediction import Bottleneck, Prediction
from planner.profile import Profile
from planner.schedule import schedule
from planner.simulate import simulate, step_seconds


def predict_hybrid(
    run: HybridRun,
    profile: Profile,
    *,
    model: PlannedModel,
    settings: Settings,
    needs: Needs,
    prompt_tokens: int,
    spilling: Spilling | None = None,
) -> Prediction:
    """What a plan promises for a prompt of `prompt_tokens` and an answer of 128 tokens.

    `spilling`: where keys and values lie that neither the GPU nor RAM holds.
    """
    answer_tokens = min(ANSWER_TOKENS, max(settings.context_tokens - prompt_tokens, 0))
    depth = prompt_tokens + answer_tokens // 2
    problem, assignment = run.step(tokens=1, depth=depth)
    timeline = simulate(schedule(problem, assignment))
    bound_by, token_s = bottleneck(problem, assignment, timeline), timeline.seconds
    if spilling is not None:
        lost_s, reading_s = host_lost_seconds(run.shape, run.split, spilling, depth, token_s)
        bound_by, token_s = Bottleneck.FLASH if reading_s > token_s else bound_by, token_s + lost_s
    decode = profile.residual(correction_keys("decode", model, settings, bound_by))
    prefill = profile.residual(correction_keys("prefill", model, settings, bound_by))
    ttft_s = prompt_seconds(run, prompt_tokens, settings.prefill_chunk_tokens, spilling) * prefill.factor
    return Prediction(
        decode_tokens_per_s=1 / (token_s * decode.factor),
        prefill_tokens_per_s=prompt_tokens / ttft_s,
        ttft_s=ttft_s,
        peak_ram_bytes=needs.ram.peak_bytes,
        peak_gpu_bytes=needs.gpu.peak_bytes,
        bottleneck=bound_by,
        prompt_tokens=prompt_tokens,
        decode_correction=decode,
        prefill_correction=prefill,
        hit_rate=run.hit_rate(1) if run.split.cache_slots(run.shape) else None,
    )


def prompt_seconds(run: HybridRun, prompt_tokens: int, chunk_tokens: int, spilling: Spilling | None = None) -> float:
    """Until the logits behind a prompt are there, chunk by chunk; uncorrected."""
    seconds = PACKED_FIRST_STEP_S
    for start in range(0, prompt_tokens, chunk_tokens):
        tokens = min(chunk_tokens, prompt_tokens - start)
        chunk_s = step_seconds(*run.step(tokens=tokens, depth=start))
        if spilling is not None:
            chunk_s += host_lost_seconds(run.shape, run.split, spilling, start + tokens - 1, chunk_s)[0]
        seconds += chunk_s
    return seconds
