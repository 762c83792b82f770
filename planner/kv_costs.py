"""What longer contexts cost, by the type of the KV cache: bytes, and how fast a token comes with the context full.

Knows nothing about how plans are found: each cost is a question of its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from cpu_kernels.kv_types import KVType
from offload.errors import DoesNotFitError
from planner.cost import ANSWER_TOKENS
from planner.kv import keeps
from planner.plan import Plan
from planner.question import Question
from planner.solve import solve

CONTEXTS = (4096, 16384, 65536, 131072)
TYPES = (KVType.F16, KVType.Q8_0, KVType.KIVI4)


@dataclass(frozen=True, slots=True)
class KVCost:
    """A context in a type; the speed is None where that does not fit."""

    context_tokens: int
    kind: KVType
    num_bytes: int  # of keys and values
    on_flash: bool  # a part of them
    decode_tokens_per_s: float | None


def kv_costs(question: Question, plan: Plan) -> tuple[KVCost, ...]:
    """Contexts that the model was trained for, each in the types that the loop can keep."""
    longest = max(question.shape.context_length, plan.settings.context_tokens)
    contexts = [tokens for tokens in CONTEXTS if tokens <= longest] or [longest]
    return tuple(cost for tokens in contexts for cost in _of_context(question, tokens))


def _of_context(question: Question, tokens: int) -> Iterator[KVCost]:
    for kind in TYPES:
        policy = replace(question.wish.kv, key=kind, value=kind)
        if not keeps(question.wish.loop, policy):
            continue
        wish = replace(question.wish, context_tokens=tokens, prompt_tokens=max(tokens - ANSWER_TOKENS, 1))
        asked = replace(question, wish=wish).with_kv(policy)
        num_bytes = asked.shape.kv_bytes_per_token * tokens
        try:
            other = solve(asked)
        except DoesNotFitError:
            yield KVCost(tokens, kind, num_bytes, False, None)
            continue
        spills = other.settings.kv_ram_bytes is not None
        yield KVCost(tokens, kind, num_bytes, spills, other.predicted.decode_tokens_per_s)
