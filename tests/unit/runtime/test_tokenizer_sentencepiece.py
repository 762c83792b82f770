"""Merges by score against a slow, obvious reference."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.gguf import GGUFFile
from runtime.tokenizer import Tokenizer
from runtime.tokenizer.sentencepiece import SentencePieceBPE
from runtime.tokenizer.vocabulary import Defaults, Vocabulary, read_vocabulary
from tests.support.tokenizer_files import NORMAL, UNKNOWN, write_sentencepiece, write_vocabulary

ALPHABET = "ab▁é"


def slow_merge(scores: dict[str, float], text: str) -> list[str]:
    """Joins the best-scoring pair of neighbours, the leftmost of equals, until there is none."""
    pieces = list(text)
    while True:
        joined = [left + right for left, right in pairwise(pieces)]
        candidates = [(-scores[piece], at) for at, piece in enumerate(joined) if piece in scores]
        if not candidates:
            return pieces
        at = min(candidates)[1]
        pieces[at : at + 2] = [joined[at]]


def vocabulary_of(folder: Path, pieces: dict[str, float]) -> Vocabulary:
    """Read back from a file, as the tokenizer sees it; scores are float32 there."""
    path = write_sentencepiece(folder / "v.gguf", [*pieces.items()])
    with GGUFFile.open(path) as gguf:
        return read_vocabulary(gguf, Defaults(unk_id=0))


@settings(max_examples=150)
@given(
    pieces=st.dictionaries(
        st.text(ALPHABET, min_size=1, max_size=5), st.integers(-6, 0).map(float), min_size=1, max_size=40
    ),
    texts=st.lists(st.text(ALPHABET + "c", min_size=1, max_size=30), min_size=1, max_size=5),
)
def test_merges_equal_the_reference(
    tmp_path_factory: pytest.TempPathFactory, pieces: dict[str, float], texts: list[str]
) -> None:
    vocabulary = vocabulary_of(tmp_path_factory.mktemp("v"), pieces)
    algorithm = SentencePieceBPE(vocabulary)
    for text in texts:
        expected: list[int] = []
        for piece in slow_merge(pieces, text):
            known = vocabulary.ids.get(piece)
            expected += [vocabulary.ids[f"<0x{byte:02X}>"] for byte in piece.encode()] if known is None else [known]
        assert algorithm.encode(text, after_special=False) == expected
        assert algorithm.encode(text, after_special=False) == expected  # from the cache


def test_the_leftmost_of_equal_scores_wins(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(
        write_sentencepiece(tmp_path / "v.gguf", [("ab", -1), ("ba", -1)], add_space_prefix=False)
    )
    assert [tokenizer.token_text(i) for i in tokenizer.encode("aba", add_special=False)] == ["ab", "<0x61>"]
    assert [tokenizer.token_text(i) for i in tokenizer.encode("bab", add_special=False)] == ["ba", "<0x62>"]


def test_without_byte_tokens_what_is_unknown_is_the_unknown_token(tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "v.gguf", "llama", ["<unk>", "a"], kinds=[UNKNOWN, NORMAL], scores=[0, -1])
    tokenizer = Tokenizer.from_gguf(path)
    assert tokenizer.encode("aé", add_special=False) == [0, 0, 0, 1, 0, 0]  # three bytes of U+2581, a, two of é


def test_the_cache_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.tokenizer.sentencepiece._CACHED_PARTS", 3)
    algorithm = SentencePieceBPE(vocabulary_of(tmp_path, {"a": -1.0, "b": -2.0}))
    for text in ("a", "b", "c", "d", "e", "é"):
        algorithm.encode(text, after_special=False)
        assert len(algorithm._cache) <= 3
    algorithm = SentencePieceBPE(vocabulary_of(tmp_path, {"ab": -1.0, "ba": -2.0}))
    algorithm.encode("ab" * 100, after_special=False)
    assert not algorithm._cache  # long parts are not worth keeping
