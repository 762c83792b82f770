"""Bytes to text, piece by piece."""

from hypothesis import given
from hypothesis import strategies as st

from runtime.tokenizer import StreamDecoder


@given(chunks=st.lists(st.binary(max_size=6), max_size=12), strip_space=st.booleans())
def test_any_bytes(chunks: list[bytes], strip_space: bool) -> None:
    stream = StreamDecoder(chunks.__getitem__, strip_space=strip_space)
    shown = [stream.push(index) for index in range(len(chunks))]
    whole = b"".join(chunks)
    if strip_space:
        whole = whole.removeprefix(b" ")
    assert "".join(shown) + stream.flush() == whole.decode("utf-8", "replace")


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_byte_by_byte_no_replacement_is_shown(text: str) -> None:
    data = text.encode()
    stream = StreamDecoder(lambda index: data[index : index + 1])
    shown = [stream.push(index) for index in range(len(data))]
    assert "".join(shown) == text
    assert stream.flush() == ""
    held = 0
    for index, piece in enumerate(shown):
        held = 0 if piece else held + 1
        assert held <= 3, index


def test_a_cut_character_shows_at_the_end() -> None:
    stream = StreamDecoder(lambda _: "é".encode()[:1])
    assert stream.push(0) == ""
    assert stream.flush() == "\ufffd"


def test_the_space_is_taken_from_the_first_text() -> None:
    pieces = [b"", b" ", b" a"]
    stream = StreamDecoder(pieces.__getitem__, strip_space=True)
    assert [stream.push(index) for index in range(3)] == ["", "", " a"]
