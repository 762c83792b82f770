"""Questions whose answers lie in the KV cache: a file of them, and how many tokens of an answer a model finds.

A line is a JSON document: {"prompt": "...", "answer": "..."}. The prompt is read but for its last token, then that
token and the answer's are told one after the other, each after what came before it. Knows nothing about policies.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from offload.errors import RequestError
from runtime.executor import Step
from runtime.executor.program import ProgramExecutor, ProgramKV

Encode = Callable[[str, bool], Sequence[int]]
"""(text, whether the model's start token goes before it) -> ids."""


@dataclass(frozen=True, slots=True)
class Question:
    """Token ids."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Of both."""
        return len(self.prompt) + len(self.answer)


def read_questions(text: str, name: str, encode: Encode) -> list[Question]:
    """Those of a file's text; RequestError, naming the file and the line, for what is none."""
    questions = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
            parts = [document[key] for key in ("prompt", "answer")]
        except (ValueError, KeyError, TypeError) as error:
            raise RequestError(
                f"{name}, line {number} is no question: {error}", hint='a line is {"prompt": "...", "answer": "..."}'
            ) from error
        if not all(isinstance(part, str) for part in parts):
            raise RequestError(f"{name}, line {number} is no question: prompt and answer must be text")
        prompt, answer = tuple(encode(parts[0], True)), tuple(encode(parts[1], False))
        if not prompt or not answer:
            raise RequestError(f"{name}, line {number}: prompt and answer must have a token each")
        questions.append(Question(prompt, answer))
    if not questions:
        raise RequestError(f"{name} holds no questions")
    return questions


def found_tokens(executor: ProgramExecutor, kv: ProgramKV, question: Question) -> int:
    """How many tokens of the answer come first, with an empty cache that has room for the question."""
    *before, last = question.prompt
    if before:
        executor.forward([Step(before, kv)], logits="none")
    rows = executor.forward([Step([last, *question.answer[:-1]], kv)], logits="all")[0]
    return int((rows.argmax(1) == np.array(question.answer)).sum())
