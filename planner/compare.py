"""Files of a model side by side: which runs how fast on one machine, and what it takes.

Bits a weight are told as a fact; how good the answers are is not judged.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from offload.errors import DoesNotFitError
from planner.plan import Plan
from planner.question import Question
from planner.solve import solve


@dataclass(frozen=True, slots=True)
class Ranked:
    """A file with its plan, or the reason why there is none."""

    path: str
    byte_size: int
    bits_per_weight: float
    plan: Plan | None
    refusal: str | None = None


def ranked(questions: Iterable[Question]) -> tuple[Ranked, ...]:
    """The files of `questions`, fastest decode first, what does not fit last, smaller files first among equals."""
    files = [_ranked(question) for question in questions]
    return tuple(sorted(files, key=lambda file: (-_speed(file), file.byte_size)))


def _ranked(question: Question) -> Ranked:
    model = question.model
    try:
        plan, refusal = solve(question), None
    except DoesNotFitError as error:
        plan, refusal = None, str(error)
    return Ranked(model.path, model.byte_size, question.bits_per_weight, plan, refusal)


def _speed(file: Ranked) -> float:
    return file.plan.predicted.decode_tokens_per_s if file.plan is not None else 0.0
