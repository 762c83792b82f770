"""WordPiece: words, normalisation, longest match."""

from pathlib import Path

import pytest

from runtime.tokenizer import Tokenizer
from tests.support.tokenizer_files import write_vocabulary

PIECES = ["▁play", "▁p", "ing", "lay", "▁!", "▁naive", "▁naïve", "▁N", "▁中", "▁文", "▁$"]
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *PIECES]


def tokenizer(folder: Path, **keys: bool) -> Tokenizer:
    """Over a few pieces."""
    return Tokenizer.from_gguf(
        write_vocabulary(
            folder / "v.gguf", "bert", TOKENS, kinds=[3] * 4 + [1] * (len(TOKENS) - 4), bos_token_id=2,
            unknown_token_id=1, seperator_token_id=3, **keys,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("playing", ["▁play", "ing"]),
        ("PLAYING!", ["▁play", "ing", "▁!"]),
        (" play\u3000 play\n", ["▁play", "▁play"]),
        ("na\u0131ve", ["[UNK]"]),
        ("naïve nai\u0308ve", ["▁naive", "▁naive"]),
        ("中文", ["▁中", "▁文"]),
        ("$!", ["▁$", "▁!"]),
        ("pl\0ay\ufffd\u200bing", ["▁play", "ing"]),
        ("playx", ["[UNK]"]),
        ("", []),
    ],
)
def test_pieces(tmp_path: Path, text: str, expected: list[str]) -> None:
    bert = tokenizer(tmp_path)
    ids = bert.encode(text)
    assert (ids[0], ids[-1]) == (2, 3)
    assert [bert.token_text(token_id) for token_id in ids[1:-1]] == expected


def test_case_and_accents_by_the_file(tmp_path: Path) -> None:
    cased = tokenizer(tmp_path, normalizer__lowercase=False)
    assert [cased.token_text(i) for i in cased.encode("naïve N", add_special=False)] == ["▁naïve", "▁N"]
    accents = tokenizer(tmp_path, normalizer__strip_accents=False)
    assert [accents.token_text(i) for i in accents.encode("NAÏVE", add_special=False)] == ["▁naïve"]


def test_decode(tmp_path: Path) -> None:
    bert = tokenizer(tmp_path)
    assert bert.decode(bert.encode("playing!")) == " playing !"
