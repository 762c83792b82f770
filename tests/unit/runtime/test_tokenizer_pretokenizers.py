"""Every pre-tokenizer on one text of hard cases; the expected words were confirmed against llama.cpp's ids."""

import json
from pathlib import Path

import pytest
from tokenizers import Regex
from tokenizers import pre_tokenizers as library

from runtime.tokenizer.pretokenizers import PRE_TOKENIZERS

GOLDEN = json.loads(Path(__file__).with_name("pretokenizer_words.json").read_text(encoding="utf-8"))


def words(name: str, text: str) -> list[str]:
    """The text, cut."""
    splits = PRE_TOKENIZERS[name].splits
    steps = [library.Split(Regex(split.pattern), split.behavior) for split in splits]
    return [word for word, _ in library.Sequence(steps).pre_tokenize_str(text)]


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_words(name: str) -> None:
    family = next(found for found in GOLDEN["families"] if name in found["names"])
    assert words(name, GOLDEN["text"]) == family["words"]


@pytest.mark.parametrize("name", sorted({found["names"][0] for found in GOLDEN["families"]}))
@pytest.mark.parametrize("unit", [" ", "a", "aA", "1", "!", "\n", " a", "中", "e\u0301", "'s"])
def test_long_runs_lose_nothing(name: str, unit: str) -> None:
    text = unit * 2000
    assert "".join(words(name, text)) == text
