"""String arrays over their bytes."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.gguf_values import StringArray


def string_array(texts: list[bytes]) -> StringArray:
    raw = b"".join(struct.pack("<Q", len(text)) + text for text in texts)
    starts = np.cumsum([8, *(len(text) + 8 for text in texts)])
    return StringArray(raw, starts.astype(np.int64))


@given(st.lists(st.binary(max_size=6), max_size=8))
def test_it_is_the_list_of_its_strings(texts: list[bytes]) -> None:
    strings = string_array(texts)
    decoded = [text.decode("utf-8", "surrogateescape") for text in texts]
    assert len(strings) == len(texts)
    assert list(strings) == decoded
    assert strings == decoded
    assert [strings.encoded(index) for index in range(-len(texts), 0)] == texts
    assert strings[1:7:2] == decoded[1:7:2]
    assert strings[::-1] == decoded[::-1]
    assert all(strings.index(text) == decoded.index(text) for text in decoded)


def test_what_is_not_there() -> None:
    strings = string_array([b"a", b"b"])
    for index in (2, -3):
        with pytest.raises(IndexError, match="array of 2 strings"):
            strings[index]
    assert "c" not in strings
    assert strings != ["a"]
    assert strings != ["a", "c"]
    assert strings != 7


def test_it_says_what_it_is() -> None:
    assert repr(string_array([b"a", b"b"])) == "StringArray(2 strings: ['a', 'b'])"
    assert repr(string_array([b"a"] * 9)) == "StringArray(9 strings: ['a', 'a', 'a', ...])"
    assert string_array([b"abc"]).num_bytes == 11 + 16
