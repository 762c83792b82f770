"""A model that remembers pairs of keys and values: what reading a part of the KV cache, and its types, still find."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cpu_kernels.kv_policy import KVPolicy
from cpu_kernels.kv_types import KVType
from offload.errors import RequestError
from offload.gguf import GGUFFile
from runtime.cli.main import State, app
from runtime.executor.program import ProgramExecutor
from runtime.kv_questions import Question, found_tokens, read_questions
from runtime.tokenizer import Tokenizer
from tests.support import programs

RECALL = Path(__file__).parents[2] / "data" / "recall.gguf"  # made by scripts/train_recall.py
FILLER = "abcdefghijklmnopqrstuvwxyz.,;:"
VALUES = "0123456789ABCDEFGHIJKLMNOPQRSTUV"
KEYS = [chr(0xAC00 + 16 * index) for index in range(512)]
TOKENS = 2048
QUESTIONS = 50


def question(random: np.random.Generator, tokens: int, pairs: int) -> dict[str, str]:
    """Pairs in filler; the last token is a key that was there."""
    text = [str(letter) for letter in random.choice(list(FILLER), tokens)]
    keys, values = random.permutation(KEYS)[:pairs], random.choice(list(VALUES), pairs)
    for place, key, value in zip(2 * random.permutation(tokens // 2 - 1), keys, values, strict=False):
        text[place : place + 2] = str(key), str(value)
    asked = int(random.integers(pairs))
    return {"prompt": "".join([*text[:-1], str(keys[asked])]), "answer": str(values[asked])}


def lines(count: int, tokens: int, pairs: int) -> str:
    random = np.random.default_rng(3)
    return "\n".join(json.dumps(question(random, tokens, pairs)) for _ in range(count)) + "\n\n"


@pytest.fixture(scope="module")
def asked() -> list[Question]:
    with GGUFFile.open(RECALL) as file:
        tokenizer = Tokenizer.from_gguf(file)
    text = lines(QUESTIONS, TOKENS, 100)
    return read_questions(text, "here", lambda part, begins: tokenizer.encode(part, add_special=begins))


@pytest.fixture(scope="module")
def executor() -> Iterator[ProgramExecutor]:
    with programs.executor(RECALL, threads=2) as made:
        yield made


def found(executor: ProgramExecutor, asked: list[Question], policy: KVPolicy) -> float:
    """The share of questions that are answered."""
    right = [found_tokens(executor, executor.new_kv(each.num_tokens, policy), each) for each in asked]
    return sum(right) / sum(len(each.answer) for each in asked)


def test_a_part_of_the_cache_finds_as_much_as_all_of_it(executor: ProgramExecutor, asked: list[Question]) -> None:
    assert all(each.num_tokens == TOKENS + 2 for each in asked)
    dense = found(executor, asked, KVPolicy())
    assert dense >= 0.96
    assert found(executor, asked, KVPolicy(budget_tokens=512)) >= dense - 0.02
    assert found(executor, asked[:20], KVPolicy(KVType.Q8_0, KVType.Q4_0, budget_tokens=512)) >= dense - 0.05
    least = found(executor, asked[:20], KVPolicy(budget_tokens=256))
    assert least < dense, "a budget may be too small: what is not read is not found"


def test_the_command_asks_questions(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(lines(3, 600, 20), "utf-8")
    options = ["-m", str(RECALL), "--questions", str(path), "-c", "512", "--chunks", "1", "--kv-budget", "256"]
    result = CliRunner().invoke(app, ["kv-eval", *options, "--json", "-t", "1"], obj=State())
    assert result.exit_code == 0, result.output
    plain, part = json.loads(result.stdout)["scores"]
    assert plain["retrieved"] == 1
    assert (plain["read"], part["policy"]) == (1, "f16/f16, budget 256")
    assert 0 < part["read"] < 1
    assert part["divergence"] > 0


def test_what_is_no_question_is_refused(tmp_path: Path) -> None:
    def encode(text: str, _begins: bool) -> list[int]:
        return [ord(letter) for letter in text]

    for text, why in (
        ("{", "line 1 is no question"),
        ('\n{"prompt": "a"}', "line 2 is no question"),
        ('{"prompt": 1, "answer": "b"}', "must be text"),
        ('{"prompt": "a", "answer": ""}', "a token each"),
        ("\n", "holds no questions"),
    ):
        with pytest.raises(RequestError, match=why):
            read_questions(text, "file", encode)
    refused = CliRunner().invoke(app, ["kv-eval", "-m", "demo"], obj=State())
    assert isinstance(refused.exception, RequestError)
    assert "nothing to score" in str(refused.exception)
