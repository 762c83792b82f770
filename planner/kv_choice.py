"""Chooses the types of the KV cache where the user leaves them to the planner; names those that would fit where not.

float16 stays as long as it fits in RAM: it is what a model was measured with. Where the context does not fit, the next
smaller type is taken, which changes answers a little; where none fits, what spills a part of it to flash and has room
there. Knows nothing about how a plan is found.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from cpu_kernels.kv_policy import KVPolicy
from cpu_kernels.kv_types import KVType
from offload.errors import DoesNotFitError
from planner.budget import format_size
from planner.kv import keeps
from planner.kv_flash import flash_kv_bytes
from planner.kv_spill import spill_room
from planner.machine import Machine
from planner.plan import Plan
from planner.question import Question

SMALLER = (KVType.Q8_0, KVType.KIVI4)  # the one first that costs least quality; see `strata kv-eval`

Solve = Callable[[Question], Plan]


def choose_kv(question: Question, solve: Solve) -> Plan:
    """The plan with the first types that fit in RAM, else in RAM and the drive, else the first that spills.

    DoesNotFitError where none does.
    """
    asked = question.wish.kv
    spilled: list[Plan] = []
    refused: DoesNotFitError | None = None
    for policy in (asked, *_smaller(question)):
        try:
            plan = solve(question.with_kv(policy))
        except DoesNotFitError as error:
            refused = _with_types(error, policy)
            continue
        if policy != asked:
            plan = replace(plan, notes=(_reason(question, plan), *plan.notes))
        if not _flash_bytes(question, plan):
            return plan
        spilled.append(plan)
        if question.wish.kv_ram_bytes is not None and _has_room(question, plan):
            return plan
    if spilled:
        return next((plan for plan in spilled if _has_room(question, plan)), spilled[0])
    assert refused is not None, "every policy is refused"
    raise refused


def _has_room(question: Question, plan: Plan) -> bool:
    """Whether the drive has room for what a full context leaves to it."""
    place = question.place
    if isinstance(place, Machine):
        return place.flash is None or _flash_bytes(question, plan) <= place.flash.free_bytes
    return _flash_bytes(question, plan) <= spill_room()


def _flash_bytes(question: Question, plan: Plan) -> int:
    """Of the keys and values of a full context."""
    return flash_kv_bytes(question.shape.with_kv(plan.settings.kv), plan)


def with_fitting_types(error: DoesNotFitError, question: Question, solve: Solve) -> DoesNotFitError:
    """`error`, naming the types of keys and values that would fit where those asked for do not."""
    for policy in _smaller(question):
        try:
            solve(question.with_kv(policy))
        except DoesNotFitError:
            continue
        hint = f"{error.hint}; keys and values as {policy.key} fit: -ctk {policy.key} -ctv {policy.value}"
        return _told(error, str(error), hint)
    return error


def _smaller(question: Question) -> Iterator[KVPolicy]:
    """Policies that keep less of each number than what is wished for, as far as the loop can."""
    kv = question.wish.kv
    for kind in SMALLER:
        policy = replace(kv, key=kind, value=kind)
        if kind.bits < min(kv.key.bits, kv.value.bits) and keeps(question.wish.loop, policy):
            yield policy


def _with_types(error: DoesNotFitError, policy: KVPolicy) -> DoesNotFitError:
    """`error`, saying what keys and values were kept in."""
    return error if policy.is_plain else _told(error, f"{error}; keys and values as {policy.name}", error.hint)


def _told(error: DoesNotFitError, message: str, hint: str | None) -> DoesNotFitError:
    return DoesNotFitError(message, needed_bytes=error.needed_bytes, available_bytes=error.available_bytes, hint=hint)


def _reason(question: Question, plan: Plan) -> str:
    """Why float16 was not kept."""
    tokens = plan.settings.context_tokens
    plain, now = (question.shape.with_kv(kv).kv_bytes_per_token * tokens for kv in (question.wish.kv, plan.settings.kv))
    return (
        f"keys and values are kept as {plan.settings.kv.key}: {format_size(now)} instead of {format_size(plain)}, "
        "which do not fit; answers differ a little (with -ctk f16 -ctv f16 nothing is rounded further)"
    )
