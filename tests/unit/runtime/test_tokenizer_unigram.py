"""The unigram model: best total score against all segmentations, normalisation, character map."""

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import ModelFormatError
from runtime.tokenizer import Tokenizer
from tests.support.tokenizer_files import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, KeyValue, write_vocabulary


def unigram(path: Path, pieces: dict[str, float], *, user_defined: tuple[str, ...] = (), **keys: KeyValue) -> Tokenizer:
    """<pad>, </s>, <unk>, user-defined tokens and pieces."""
    tokens = ["<pad>", "</s>", "<unk>", *user_defined, *pieces]
    kinds = [CONTROL, CONTROL, UNKNOWN, *[USER_DEFINED] * len(user_defined), *[NORMAL] * len(pieces)]
    scores = [0.0] * (3 + len(user_defined)) + [*pieces.values()]
    return Tokenizer.from_gguf(write_vocabulary(path, "t5", tokens, kinds=kinds, scores=scores, **keys))


def spelled(tokenizer: Tokenizer, text: str) -> list[str]:
    """The tokens of a text, without EOS."""
    return [tokenizer.token_text(token_id) for token_id in tokenizer.encode(text, add_special=False)]


def best_score(scores: dict[str, float], unknown: float, text: str) -> float:
    """Of all ways to cut `text` into pieces and unknown characters that are no piece."""
    if not text:
        return 0.0
    heads = [text[:end] for end in range(1, min(3, len(text)) + 1) if text[:end] in scores]
    found = [scores[head] + best_score(scores, unknown, text[len(head) :]) for head in heads]
    if text[0] not in scores:
        found.append(unknown + best_score(scores, unknown, text[1:]))
    return max(found)


@settings(max_examples=80)
@given(
    pieces=st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(-20, -1).map(float), min_size=1),
    text=st.text("abcd", min_size=1, max_size=9),
)
def test_the_best_segmentation(tmp_path_factory: pytest.TempPathFactory, pieces: dict[str, float], text: str) -> None:
    tokenizer = unigram(tmp_path_factory.mktemp("v") / "v.gguf", pieces)
    unknown = min(pieces.values()) - 10
    found = spelled(tokenizer, text)
    if "<unk>" not in found:  # neighbouring unknown characters share a token, so only whole covers can be summed
        assert "".join(found) == text
        assert sum(pieces[piece] for piece in found) == best_score(pieces, unknown, text)
    else:
        assert best_score(pieces, unknown, text) <= unknown


def test_eos_and_unknown(tmp_path: Path) -> None:
    tokenizer = unigram(tmp_path / "v.gguf", {"▁a": -1.0, "b": -2.0})
    assert tokenizer.encode(" a") == [3, 1]
    assert spelled(tokenizer, "xyb") == ["<unk>", "b"]
    assert tokenizer.decode([3, 4]) == " ab"


def test_spaces(tmp_path: Path) -> None:
    pieces = {"▁": -1.0, "▁a": -1.0, "a": -3.0}
    assert spelled(unigram(tmp_path / "a.gguf", pieces), " a  a") == ["▁a", "▁", "▁a"]
    merged = unigram(tmp_path / "b.gguf", pieces, remove_extra_whitespaces=True)
    assert spelled(merged, "a   a  ") == ["▁a", "▁a"]
    assert spelled(merged, "   ") == []
    prefixed = unigram(tmp_path / "c.gguf", pieces, add_space_prefix=True)
    assert spelled(prefixed, "aa") == ["▁a", "a"]
    assert spelled(prefixed, "  a") == ["▁", "▁", "▁a"]


def character_map(units: dict[int, int], replacements: bytes) -> bytes:
    """The file's form of a double array given unit by unit."""
    count = (max(units) // 256 + 1) * 256  # children are looked for within blocks of that size
    blob = struct.pack(f"<{count}I", *(units.get(index, 0xFF) for index in range(count)))
    return struct.pack("<I", len(blob)) + blob + replacements


OFFSET = 256
ROOT = OFFSET << 10
# "A" -> "a", "AB" -> "x": nodes at OFFSET ^ byte; children of A at node ^ 512, its value where no byte leads
NODE_A = OFFSET ^ ord("A")
AFTER_A = NODE_A ^ 512
NODE_AB = AFTER_A ^ ord("B")
AFTER_AB = NODE_AB ^ 1024
MAP = character_map(
    {
        0: ROOT,
        NODE_A: ord("A") | 0x100 | (512 << 10),
        AFTER_A: 1 << 31,
        NODE_AB: ord("B") | 0x100 | (1024 << 10),
        AFTER_AB: 1 << 31 | 2,
    },
    b"a\0x\0",
)


def test_the_longest_match_of_the_character_map(tmp_path: Path) -> None:
    tokenizer = unigram(tmp_path / "v.gguf", {"a": -1.0, "x": -1.0, "C": -1.0}, precompiled_charsmap=MAP)
    assert spelled(tokenizer, "AABCA\0é") == ["a", "x", "C", "a", "<unk>"]


def test_what_begins_a_user_defined_token_is_left_alone(tmp_path: Path) -> None:
    tokenizer = unigram(tmp_path / "v.gguf", {"a": -1.0, "A": -5.0}, user_defined=("A!",), precompiled_charsmap=MAP)
    assert spelled(tokenizer, "A!") == ["A!"]
    assert spelled(tokenizer, "Aa") == ["A", "a"]


@pytest.mark.parametrize(
    "broken",
    [
        b"\0",
        struct.pack("<I", 100) + b"abc",
        character_map({0: 5000 << 10}, b"a\0"),
        character_map({0: ROOT, NODE_A: ord("A") | 0x100 | (512 << 10), AFTER_A: 1 << 31 | 9}, b"a\0"),
    ],
)
def test_broken_character_maps(tmp_path: Path, broken: bytes) -> None:
    with pytest.raises(ModelFormatError, match=r"v\.gguf.*precompiled_charsmap"):
        unigram(tmp_path / "v.gguf", {"a": -1.0}, precompiled_charsmap=broken).encode("AB")
