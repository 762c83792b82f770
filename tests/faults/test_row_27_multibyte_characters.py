"""Row 27, the half about characters split over tokens: bytes are held back, the stream equals the whole answer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.tokenizer import Tokenizer
from tests.support.tokenizer_files import write_byte_level, write_sentencepiece

TEXT = "é 中文 🦙🏳️‍🌈 न\u093f"


@pytest.fixture(scope="module", params=["byte-level", "bytes"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Two vocabularies in which every one of these characters is several tokens."""
    write = write_byte_level if request.param == "byte-level" else write_sentencepiece
    return Tokenizer.from_gguf(write(tmp_path_factory.mktemp("v") / "v.gguf"))


def test_no_half_character_is_shown(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert len(ids) > 2 * len(TEXT)
    stream = tokenizer.stream()
    shown = [stream.push(token_id) for token_id in ids]
    assert "".join(shown) == TEXT
    assert not any("\ufffd" in piece for piece in shown)
    assert stream.flush() == ""


@given(cut=st.integers(0, 60))
def test_an_answer_that_ends_within_a_character(tokenizer: Tokenizer, cut: int) -> None:
    ids = tokenizer.encode(TEXT)[:cut]
    stream = tokenizer.stream()
    text = "".join(map(stream.push, ids)) + stream.flush()
    assert text == tokenizer.decode(ids)
    assert text.removesuffix("\ufffd") == TEXT[: len(text.removesuffix("\ufffd"))]


@given(ids=st.lists(st.integers(3, 258), max_size=40))
def test_bytes_that_are_no_text(tokenizer: Tokenizer, ids: list[int]) -> None:
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)
