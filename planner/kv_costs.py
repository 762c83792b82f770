"""What longer contexts cost, by the type of the KV cache: bytes in RAM and on flash, and how fast a token comes then.

With the context full, read whole and as far as tokens choose. Knows nothing about how plans are found: each cost is a
question of its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from cpu_kernels.kv_types import KVType
from offload.errors import DoesNotFitError, RequestError
from planner.cost import ANSWER_TOKENS
from planner.kv import keeps
from planner.kv_flash import flash_kv_bytes
from planner.plan import Plan
from planner.question import Question
from planner.solve import solve

CONTEXTS = (4096, 16384, 65536, 131072)
TYPES = (KVType.F16, KVType.Q8_0, KVType.KIVI4)
BUDGET_TOKENS = 2048  # that are read of a context where no other budget is asked for


@dataclass(frozen=True, slots=True)
class KVCost:
    """A context in a type; a speed is None where that does not fit, or a budget would read all."""

    context_tokens: int
    kind: KVType
    num_bytes: int  # of keys and values
    flash_bytes: int  # of those, that RAM has no room for
    decode_tokens_per_s: float | None
    budget_tokens: int
    budget_tokens_per_s: float | None  # where tokens choose what they read


def kv_costs(question: Question, plan: Plan) -> tuple[KVCost, ...]:
    """Contexts that the model was trained for, each in the types that the loop can keep."""
    longest = max(question.shape.context_length, plan.settings.context_tokens)
    contexts = [tokens for tokens in CONTEXTS if tokens <= longest] or [longest]
    return tuple(cost for tokens in contexts for cost in _of_context(question, tokens))


def _of_context(question: Question, tokens: int) -> Iterator[KVCost]:
    wish = question.wish
    budget = wish.kv.budget_tokens or BUDGET_TOKENS
    full = replace(wish, context_tokens=tokens, prompt_tokens=max(tokens - ANSWER_TOKENS, 1))
    for kind in TYPES:
        policy = replace(wish.kv, key=kind, value=kind, budget_tokens=None)
        if not keeps(wish.loop, policy):
            continue
        asked = replace(question, wish=full).with_kv(policy)
        sparse = replace(policy, budget_tokens=budget)
        whole, chosen = _solved(asked), None
        if budget < tokens and keeps(wish.loop, sparse):
            chosen = _solved(asked.with_kv(sparse))
        yield KVCost(
            tokens,
            kind,
            asked.shape.kv_bytes_per_token * tokens,
            0 if whole is None else flash_kv_bytes(asked.shape, whole),
            None if whole is None else whole.predicted.decode_tokens_per_s,
            budget,
            None if chosen is None else chosen.predicted.decode_tokens_per_s,
        )


def _solved(question: Question) -> Plan | None:
    try:
        return solve(question)
    except (DoesNotFitError, RequestError):  # the latter where --kv-ram is too little for it
        return None
