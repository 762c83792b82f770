"""Which tokens end an answer, and where a text is cut at special tokens."""

from pathlib import Path

import pytest

from runtime.tokenizer import Tokenizer
from runtime.tokenizer.special_tokens import SpecialToken, partition
from tests.support.tokenizer_files import KeyValue, write_byte_level


def ends(path: Path, special: list[str], **keys: KeyValue) -> set[str]:
    """The texts of the tokens that end an answer."""
    tokenizer = Tokenizer.from_gguf(write_byte_level(path, special=["<bos>", *special], **keys))
    return {tokenizer.token_text(token_id) for token_id in tokenizer.eog_ids} - {"<bos>"}


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        (["<|eot_id|>", "<|eom_id|>", "<|start_header_id|>"], {"<|eot_id|>", "<|eom_id|>"}),
        (["<|im_start|>", "<|im_end|>"], {"<|im_end|>"}),
        (["<start_of_turn>", "<end_of_turn>"], {"<end_of_turn>"}),
        (["<|end|>"], {"<|end|>"}),
        (["<|end|>", "<|return|>", "<|call|>"], {"<|return|>", "<|call|>"}),
        (["<|end|>", "<|flush|>", "<|calls|>"], {"<|flush|>", "<|calls|>"}),
        (["</s>"], {"</s>"}),
        (["</s>", "<|tool_response>"], {"<|tool_response>"}),
        (["<fim_pad>", "<fim-pad>", "<|file_sep|>", "<reponame>"], {"<fim_pad>", "<|file_sep|>", "<reponame>"}),
        (["<fim_prefix>", "<fim_suffix>"], set()),
    ],
)
def test_ends_by_name(tmp_path: Path, special: list[str], expected: set[str]) -> None:
    assert ends(tmp_path / "v.gguf", special) == expected


def test_ends_by_key(tmp_path: Path) -> None:
    base = 256 + 5
    keys = {"eot_token_id": base + 1, "eom_token_id": base + 2, "fim_pad_token_id": base + 3}
    assert ends(tmp_path / "v.gguf", ["<x>", "<y>", "<z>", "<fim_pad>"], **keys) == {"<x>", "<y>", "<z>"}


def test_names_make_control_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(
        write_byte_level(tmp_path / "v.gguf", user_defined=["<|im_end|>", "<fim_prefix>"], special=["<s>"])
    )
    assert tokenizer.decode(tokenizer.encode("<|im_end|>", parse_special=True)) == ""
    assert len(tokenizer.encode("<fim_prefix>")) > 1


def test_harmony_tokens_are_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(write_byte_level(tmp_path / "v.gguf", special=["<s>", "<|channel|>"]))
    assert tokenizer.decode(tokenizer.encode("<|channel|>x")) == "<|channel|>x"
    assert len(tokenizer.encode("<|channel|>")) == 1


def test_the_longest_token_is_cut_first() -> None:
    tokens = (SpecialToken("<ab>", 1, False), SpecialToken("ab", 2, False), SpecialToken("<b>", 3, True))
    assert partition("x<ab>ab<b>", tokens, parse_special=False) == ["x", 1, 2, "<b>"]
    assert partition("x<ab>ab<b>", tokens, parse_special=True) == ["x", 1, 2, 3]
    assert partition("", tokens, parse_special=True) == []
    assert partition("plain", tokens, parse_special=True) == ["plain"]


def test_whitespace_at_either_side() -> None:
    left, right = SpecialToken("<m>", 1, False, strips_left=True), SpecialToken("<r>", 2, False, strips_right=True)
    assert partition("a \n<m> b", (left,), parse_special=False) == ["a", 1, " b"]
    assert partition("  <m>", (left,), parse_special=False) == [1]
    assert partition("a <r>\t\u00a0b<r> ", (right,), parse_special=False) == ["a ", 2, "\u00a0b", 2]


@pytest.mark.parametrize(
    ("model", "text", "expected"),
    [
        (("Phi-3 mini", "gpt-2", "phi3"), "<s> <|end|> a", ["<s>", "Ġ", "<|end|>", "a"]),
        (("test", "jina-v2-de", "jina-bert-v2"), "a <mask> ", ["a", "<mask>", "Ġ"]),
        (("test", "gpt-2", "nomic-bert-moe"), "a <mask> ", ["a", "<mask>", "Ġ"]),
        (("Modern-BERT", "gpt-2", "modern-bert"), "a [MASK] ", ["a", "[MASK]", "Ġ"]),
        (("test", "gpt-2", "llama"), "a <mask> ", ["a", "Ġ", "<mask>", "Ġ"]),
    ],
)
def test_stripping_by_the_models_name(
    tmp_path: Path, model: tuple[str, str, str], text: str, expected: list[str]
) -> None:
    name, pre, architecture = model
    special = ["<s>", "<|end|>", "<mask>", "[MASK]"]
    path = write_byte_level(tmp_path / "v.gguf", special=special, name=name, pre=pre, architecture=architecture)
    tokenizer = Tokenizer.from_gguf(path)
    ids = tokenizer.encode(text, add_special=False, parse_special=True)
    assert [tokenizer.token_text(token_id) for token_id in ids] == expected
