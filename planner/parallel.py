"""How many sequences to answer together: as many as make tokens cheaper.

What is read for a step, from RAM or from flash, serves all its sequences; arithmetic and the KV cache are every
sequence's own. Knows nothing about who runs them; that their KV rows fit is seen to where they are begun.
"""

from dataclasses import replace

from offload.gguf import GGUFFile
from planner import cost
from planner.drive import streaming_here
from planner.model_shape import ModelShape
from planner.plan import Plan, Settings
from planner.profile import Profile, load_or_measure
from planner.profile_types import with_types
from planner.question import Here, Wish, ask
from planner.streamed import Streaming, least_slots
from planner.ways import PROGRAM

# Measured on two Zen 5 cores: OLMoE-1B-7B Q4_0 with slots for a third of its experts on a drive of 4 GB/s generates
# 9.3, 10.6, 12.4, 13.3, 18.7, 38.6 and 70.8 tokens/s with 1, 2, 4 to 64 sequences; a 1B model of ternary weights in
# RAM 149, 243, 332, 416, 387, 380 and 397.
COUNTS = (1, 2, 4, 8, 16, 32, 64)
GOOD_SHARE = 0.9  # of the most tokens a second: fewer sequences that reach it keep fewer waiting
OTHER_LOOPS = 8  # sequences for loops that compute one after the other


def parallel_here(plan: Plan, gguf: GGUFFile, rows: int) -> int:
    """Sequences of about `rows` KV rows each that `plan` answers together best on this machine."""
    settings = plan.settings
    if settings.loop != PROGRAM:
        return OTHER_LOOPS
    wish = Wish(settings.context_tokens, settings.threads, loop=settings.loop, objective=plan.objective, kv=settings.kv)
    profile = load_or_measure()
    question = ask(gguf, plan.budget, Here(profile, None), wish)
    profile = with_types(profile, question.shape, settings.weights_form)
    return best_parallel(
        question.shape, profile, settings, rows, streaming_here(question.shape, profile, question.model, settings)
    )


def best_parallel(
    shape: ModelShape, profile: Profile, settings: Settings, rows: int, streaming: Streaming | None
) -> int:
    """The fewest sequences that generate nearly as many tokens a second as any number of `COUNTS` that can be run."""
    room = max(settings.context_tokens // max(rows, 1), 1)
    slots = settings.stream_slots
    counts = [
        count for count in COUNTS if count == 1 or (count <= room and (not slots or least_slots(shape, count) <= slots))
    ]
    speeds = {count: count / _step_seconds(shape, profile, settings, count, rows, streaming) for count in counts}
    most = max(speeds.values())
    return next(count for count in counts if speeds[count] >= GOOD_SHARE * most)


def _step_seconds(
    shape: ModelShape, profile: Profile, settings: Settings, count: int, rows: int, streaming: Streaming | None
) -> float:
    """A token of each of `count` sequences, whose caches hold half of their rows."""
    together = replace(settings, prefill_chunk_tokens=count)
    products = cost.prefill_seconds(shape, profile, together, count, streaming)
    filled, empty = (
        sum(cost.decode_seconds(shape, profile, settings, tokens, streaming).values()) for tokens in (rows // 2, 0)
    )
    return products + count * (filled - empty)
