import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from offload.errors import FlashError
from offload.kv_session_document import DOCUMENT_NAME, SessionDocument, decode, encode, read_document, write_document
from offload.store_files import FILES
from tests.support.kv_blocks import KEY

MESSAGES = ({"role": "user", "content": "Wie groß? \ud800"}, {"role": "assistant", "content": "\N{FOX FACE}\n"})
DOCUMENT = SessionDocument(KEY, MESSAGES, (1, 5, 7))


def test_a_document_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_document(tmp_path) is None
    write_document(tmp_path, DOCUMENT, FILES)
    assert read_document(tmp_path) == DOCUMENT
    other = replace(DOCUMENT, token_ids=())
    write_document(tmp_path, other, FILES)
    assert read_document(tmp_path) == other
    assert [path.name for path in tmp_path.iterdir()] == [DOCUMENT_NAME]


def test_flipped_bits_are_all_found(tmp_path: Path) -> None:
    text = encode(DOCUMENT)
    rng = np.random.default_rng(3)
    for position in rng.integers(0, len(text) * 8, 2000):
        damaged = bytearray(text)
        damaged[position // 8] ^= 1 << (position % 8)
        with pytest.raises(FlashError) as caught:
            decode(bytes(damaged), tmp_path / DOCUMENT_NAME)
        assert caught.value.hint


def test_a_document_cut_anywhere_is_refused(tmp_path: Path) -> None:
    text = encode(DOCUMENT)
    for length in range(len(text)):
        with pytest.raises(FlashError, match="damaged"):
            decode(text[:length], tmp_path)


def test_a_newer_format_is_refused_by_its_number(tmp_path: Path) -> None:
    content = json.loads(encode(DOCUMENT))
    content["format"] = 2
    with pytest.raises(FlashError, match="format 2 is not supported, 1 is"):
        decode(json.dumps(content).encode(), tmp_path)


@pytest.mark.parametrize("text", [b"[]", b"{}", b"null", b"[" * 100_000, b'{"format":1,"xxh3":0}'])
def test_what_is_no_document_is_refused(tmp_path: Path, text: bytes) -> None:
    with pytest.raises(FlashError, match="damaged"):
        decode(text, tmp_path)
