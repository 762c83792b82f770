"""How RAM is divided where it does not hold both a model and its context: between weights, and keys and values.

What RAM does not hold of either comes from flash, over one drive. A few divisions are compared by how long a
conversation is predicted to take that fills half of the context, or has the prompt that was asked for, and is answered:
experts are used now and then, old keys and values in every step. Knows nothing about other devices than the CPU.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

from planner.budget import Budget
from planner.cost import ANSWER_TOKENS, packed_step_seconds
from planner.drive import streaming_here
from planner.kv_spill import all_kv_bytes, least_kv_ram_bytes, spilling_here
from planner.model_shape import ModelShape
from planner.plan import Settings
from planner.profile import Profile
from planner.question import Question
from planner.streamed import all_slots, least_slots, slot_bytes, streamed_needs
from planner.ways import PROGRAM, WAYS, Fit, Way, fit_way

SHARES = 8  # of what either could have, at most
ANSWERED_SHARE = 1 / 8  # of a conversation's tokens that are read, as many are written
KEPT_WHOLE_SHARE = 0.9  # of a division's time: what brings less does not pay for writing to the drive, or for both


def divides(way: Way) -> bool:
    """Whether RAM could be divided otherwise for it."""
    return way.loop == PROGRAM and (way.streams or way.spills)


def divisions(shape: ModelShape, budget: Budget, fit: Fit, kv_ram_bytes: int | None = None) -> Iterator[Fit]:
    """Other ways to have a part of either on flash than `fit`'s, as far as they fit.

    `kv_ram_bytes`: that keys and values may take at most; then a part of them has to be on flash.
    """
    is_held = False  # all of the weights, by a way that reads none
    for way in WAYS[PROGRAM]:
        if not divides(way) or (kv_ram_bytes is not None and not way.spills):
            continue
        given: Iterable[int | None] = [kv_ram_bytes]
        if way.streams and way.spills and kv_ram_bytes is None:
            given = _kv_shares(shape, budget, fit.context_tokens)
        for kv_bytes in given:
            other = fit_way(shape, budget, way, fit.context_tokens, kv_bytes)
            if other is None or (is_held and other.stream_slots >= all_slots(shape)):
                continue
            is_held = is_held or not way.streams
            yield other


def best_division(
    question: Question, profile: Profile, fits: Sequence[Fit], settings_of: Callable[[Fit], Settings]
) -> Fit:
    """That whose conversation is over first; one that has more in RAM where others are little quicker.

    All keys and values, else all weights, which short conversations gain from. `profile` knows the model's types.
    """

    def seconds(fit: Fit) -> float:
        parts = (fit.kv_ram_bytes is not None) * (1 + (fit.stream_slots > 0))
        return _conversation_seconds(question, profile, settings_of(fit)) / KEPT_WHOLE_SHARE**parts

    return min(fits, key=seconds)


def _kv_shares(shape: ModelShape, budget: Budget, context_tokens: int) -> Iterator[int]:
    """Bytes of RAM for keys and values: from the least to all that a token's experts leave."""
    least = least_kv_ram_bytes(shape, context_tokens)
    held = {"context_tokens": context_tokens, "chunk_tokens": 1, "kv_ram_bytes": 0}
    bare = streamed_needs(shape, budget, **held, slots=least_slots(shape, 1))
    most = min(budget.ram_bytes - bare.ram.needed_bytes, all_kv_bytes(shape, context_tokens) - slot_bytes(shape))
    sizes = (least + (most - least) * share // SHARES for share in range(SHARES + 1))
    yield from dict.fromkeys(max(size, least) for size in sizes)


def _conversation_seconds(question: Question, profile: Profile, settings: Settings) -> float:
    """Until a prompt of its length is read, by a chunk of its middle, and answered."""
    shape, chunk = question.shape, settings.prefill_chunk_tokens
    streaming = streaming_here(shape, profile, question.model, settings)
    spilling = spilling_here(profile, settings)
    prompt = question.wish.prompt_tokens or settings.context_tokens // 2
    place = (streaming, spilling)
    read = packed_step_seconds(shape, profile, settings, chunk, prompt // 2, *place)
    token = packed_step_seconds(shape, profile, settings, 1, prompt, *place)
    answer = max(ANSWERED_SHARE * prompt, ANSWER_TOKENS)
    return sum(read.values()) * prompt / chunk + sum(token.values()) * answer
