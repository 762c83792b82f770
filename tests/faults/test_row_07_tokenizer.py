"""Row 7, tokenizers: metadata of the wrong type, bad byte tokens, ids and merges that name nothing.

Each is refused when the file is opened, by an error that names the file and the key.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from offload.errors import ModelFormatError
from runtime.tokenizer import Tokenizer
from tests.support.tokenizer_files import BYTE, NORMAL, write_byte_level, write_sentencepiece, write_vocabulary

Write = Callable[[Path], Path]


def of(model: str = "llama", **keys: object) -> Write:
    """A file of two tokens and these keys."""
    tokens = keys.pop("tokens", ["a", "b"])
    return lambda path: write_vocabulary(path, model, tokens, **keys)  # type: ignore[arg-type]


CASES: dict[str, tuple[Write, str]] = {
    "no tokens": (of(tokens=[]), "tokenizer.ggml.tokens"),
    "a token twice": (of(tokens=["a", "b", "a"]), "tokenizer.ggml.tokens holds 'a' twice, as 0 and as 2"),
    "a token that is not UTF-8": (of(tokens=["a", b"\xff"]), r"tokenizer.ggml.tokens\[1\]"),
    "too few kinds": (of(kinds=[NORMAL]), "tokenizer.ggml.token_type has 1 entries for 2 tokens"),
    "too many kinds": (of(kinds=[NORMAL] * 3), "tokenizer.ggml.token_type has 3"),
    "too few scores": (of(scores=[0.0]), "tokenizer.ggml.scores has 1 entries for 2 tokens"),
    "a score that is no number": (of(scores=[0.0, float("nan")]), r"tokenizer.ggml.scores\[1\]"),
    "BOS outside": (of(bos_token_id=2), "tokenizer.ggml.bos_token_id"),
    "EOS outside": (of(eos_token_id=2**32 - 1), "tokenizer.ggml.eos_token_id"),
    "EOT outside": (of(eot_token_id=99), "tokenizer.ggml.eot_token_id"),
    "an id that is text": (of(bos_token_id="1"), "tokenizer.ggml.bos_token_id"),
    "a flag that is a number": (of(add_bos_token=1), "tokenizer.ggml.add_bos_token"),
    "no merges": (of("gpt2", pre="gpt-2"), "tokenizer.ggml.merges"),
}


@pytest.mark.parametrize("case", CASES)
def test_vocabulary(tmp_path: Path, case: str) -> None:
    write, message = CASES[case]
    with pytest.raises(ModelFormatError, match=message) as error:
        Tokenizer.from_gguf(write(tmp_path / "model.gguf"))
    assert "model.gguf" in str(error.value)
    assert error.value.hint


@pytest.mark.parametrize("text", ["<0xZZ>", "<0x1>", "<0x123>", "0x41", "<0xéé>", "a", "<0x 1>"])
def test_bad_byte_tokens(tmp_path: Path, text: str) -> None:
    path = write_vocabulary(tmp_path / "model.gguf", "llama", ["x", text], kinds=[NORMAL, BYTE])
    with pytest.raises(ModelFormatError, match=r"model\.gguf: tokenizer\.ggml\.tokens\[1\] is a byte token"):
        Tokenizer.from_gguf(path)


@pytest.mark.parametrize("merge", ["a zz", "zz a", "a Ġ b", "ab", "", " a", "b a"])
def test_merges_of_what_is_no_token(tmp_path: Path, merge: str) -> None:
    path = write_byte_level(tmp_path / "good.gguf", ["a b"])
    tokenizer = Tokenizer.from_gguf(path)
    tokens = [tokenizer.token_text(token_id) for token_id in range(tokenizer.vocab_size)]
    path = write_vocabulary(tmp_path / "model.gguf", "gpt2", tokens, merges=["a b", merge], pre="gpt-2")
    with pytest.raises(ModelFormatError, match=r"model\.gguf: tokenizer\.ggml\.merges"):
        Tokenizer.from_gguf(path)


def test_kinds_of_another_version_are_undefined_not_an_error(tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "model.gguf", "llama", ["a", "b"], kinds=[NORMAL, 77])
    assert Tokenizer.from_gguf(path).decode([0, 1]) == "a"


def test_a_sound_file(tmp_path: Path) -> None:
    assert Tokenizer.from_gguf(write_sentencepiece(tmp_path / "model.gguf")).encode("ab")
