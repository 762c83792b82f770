"""Byte-pair encoding by merges: both spellings of text, and the merges' order."""

from pathlib import Path

from runtime.tokenizer import Tokenizer
from runtime.tokenizer.bpe import byte_alphabet
from tests.support.tokenizer_files import (
    ALPHABET,
    BYTE,
    BYTES,
    CONTROL,
    NORMAL,
    write_byte_level,
    write_vocabulary,
)


def spelled(tokenizer: Tokenizer, text: str) -> list[str]:
    """The tokens of a text, without BOS and EOS."""
    return [tokenizer.token_text(token_id) for token_id in tokenizer.encode(text, add_special=False)]


def test_the_byte_alphabet() -> None:
    alphabet = byte_alphabet()
    assert sorted(alphabet.values()) == [bytes([byte]) for byte in range(256)]
    assert (alphabet["A"], alphabet["Ġ"], alphabet["Ċ"], alphabet["ÿ"]) == (b"A", b" ", b"\n", b"\xff")


def test_the_first_of_the_merges_wins(tmp_path: Path) -> None:
    assert spelled(Tokenizer.from_gguf(write_byte_level(tmp_path / "a.gguf", ["a b", "b c"])), "abc") == ["ab", "c"]
    assert spelled(Tokenizer.from_gguf(write_byte_level(tmp_path / "b.gguf", ["b c", "a b"])), "abc") == ["a", "bc"]


def test_of_a_merge_listed_twice_the_first_counts(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(write_byte_level(tmp_path / "v.gguf", ["a b", "b c", "a b"]))
    assert spelled(tokenizer, "abc") == ["ab", "c"]


def test_ignore_merges(tmp_path: Path) -> None:
    """Llama 3: a word that is a token is that token, even where merges lead elsewhere."""
    tokens = [*ALPHABET, "ab", "bc", "abc"]
    for pre, expected in (("llama-bpe", ["abc"]), ("gpt-2", ["ab", "c"])):
        path = write_vocabulary(tmp_path / f"{pre}.gguf", "gpt2", tokens, merges=["a b", "b c"], pre=pre)
        assert spelled(Tokenizer.from_gguf(path), "abc") == expected


def test_nothing_merges_over_a_byte_without_token(tmp_path: Path) -> None:
    tokens = [character for character in ALPHABET if character != "X"] + ["ab"]
    path = write_vocabulary(tmp_path / "v.gguf", "gpt2", tokens, merges=["a b"], pre="gpt-2")
    assert spelled(Tokenizer.from_gguf(path), "aXb ab") == ["a", "b", "Ġ", "ab"]


def test_characters_outside_of_the_alphabet_stand_for_themselves(tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "v.gguf", "gpt2", ["a", "<｜x｜>"], merges=[], pre="gpt-2")
    assert Tokenizer.from_gguf(path).token_bytes(1) == "<｜x｜>".encode()


def test_kimi_needs_no_merges(tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "v.gguf", "gpt2", [*ALPHABET, "ab"], pre="kimi-k2")
    assert spelled(Tokenizer.from_gguf(path), "ab") == ["a", "b"]


def test_gemma4_keeps_lines_apart_and_falls_back_to_bytes(tmp_path: Path) -> None:
    tokens = ["<bos>", "<eos>", *BYTES, "a", "b", "▁", "▁a", "\n", "\n\n"]
    kinds = [CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * 6]
    path = write_vocabulary(
        tmp_path / "v.gguf", "gemma4", tokens, kinds=kinds, merges=["▁ a"], bos_token_id=0, eos_token_id=1,
        add_bos_token=False,
    )  # fmt: skip
    tokenizer = Tokenizer.from_gguf(path)
    assert spelled(tokenizer, "b a\n\n é\n") == ["b", "▁a", "\n\n", "▁", "<0xC3>", "<0xA9>", "\n"]
    assert tokenizer.decode(tokenizer.encode("b a\n\n é\n")) == "b a\n\n é\n"
    assert tokenizer.encode("a")[0] == 0  # BOS, whatever the file says


def test_plain_text_without_escaped_spaces(tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "v.gguf", "gpt2", ["a", "é", "aé"], merges=["a é"], pre="whitespace")
    tokenizer = Tokenizer.from_gguf(path)
    assert spelled(tokenizer, "aé\té") == ["aé", "é"]
    assert tokenizer.decode([2, 1]) == "aéé"
