"""The public tokenizer: special tokens, BOS and EOS, decoding, and what it refuses."""

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.errors import RequestError, UnsupportedModelError
from offload.gguf import GGUFFile
from runtime.tokenizer import Tokenizer
from tests.support.tokenizer_files import (
    CONTROL,
    NORMAL,
    write_byte_level,
    write_sentencepiece,
    write_vocabulary,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level BPE with three control tokens and one user-defined."""
    return Tokenizer.from_gguf(write_byte_level(tmp_path_factory.mktemp("v") / "byte_level.gguf"))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """SentencePiece BPE."""
    return Tokenizer.from_gguf(write_sentencepiece(tmp_path_factory.mktemp("v") / "pieces.gguf"))


def spell(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The vocabulary's texts of ids."""
    return [tokenizer.token_text(token_id) for token_id in ids]


def test_attributes(byte_level: Tokenizer, pieces: Tokenizer) -> None:
    end, turn = byte_level.eos_id, byte_level.encode("<|im_end|>", add_special=False, parse_special=True)[0]
    assert byte_level.bos_id == end
    assert byte_level.eog_ids == {end, turn}
    assert (byte_level.add_bos, byte_level.add_eos) == (False, False)
    assert byte_level.vocab_size == 256 + 5 + 4
    assert (pieces.bos_id, pieces.eos_id, pieces.eog_ids) == (1, 2, frozenset({2}))
    assert (pieces.add_bos, pieces.add_eos) == (True, False)


def test_an_open_file_stays_open(tmp_path: Path) -> None:
    with GGUFFile.open(write_byte_level(tmp_path / "v.gguf")) as gguf:
        first, second = Tokenizer.from_gguf(gguf), Tokenizer.from_gguf(gguf)
    assert first.encode("the hello") == second.encode("the hello")


def test_control_tokens_are_text_unless_asked_for(byte_level: Tokenizer) -> None:
    text = "a<|im_end|>b"
    assert spell(byte_level, byte_level.encode(text, parse_special=True)) == ["a", "<|im_end|>", "b"]
    assert spell(byte_level, byte_level.encode(text)) == list(text)


def test_user_defined_tokens_are_always_found(byte_level: Tokenizer) -> None:
    for parse_special in (False, True):
        assert "<think>" in spell(byte_level, byte_level.encode("x<think>", parse_special=parse_special))


def test_bos_and_eos(tmp_path: Path) -> None:
    both = Tokenizer.from_gguf(write_byte_level(tmp_path / "v.gguf", add_bos_token=True, add_eos_token=True))
    end = both.eos_id
    assert both.encode("") == [end, end]
    assert both.encode("", add_special=False) == []
    assert both.encode("the")[1:-1] == both.encode("the", add_special=False)


def test_bos_written_in_the_text_comes_on_top_as_in_llama_cpp(pieces: Tokenizer) -> None:
    assert pieces.encode("<s>a", parse_special=True)[:2] == [1, 1]


def test_bos_by_the_pre_tokenizer(tmp_path: Path) -> None:
    assert Tokenizer.from_gguf(write_byte_level(tmp_path / "a.gguf", pre="llama-bpe")).add_bos
    assert not Tokenizer.from_gguf(write_byte_level(tmp_path / "b.gguf", pre="llama-bpe", add_bos_token=False)).add_bos


def test_asking_for_a_bos_that_is_not_named_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_vocabulary(tmp_path / "v.gguf", "gpt2", ["a"], merges=[], pre="gpt-2", add_bos_token=True)
    with caplog.at_level(logging.WARNING):
        tokenizer = Tokenizer.from_gguf(path)
    assert "BOS" in caplog.text
    assert not tokenizer.add_bos
    assert tokenizer.encode("a") == [0]


def test_missing_pre_tokenizer_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        named = Tokenizer.from_gguf(write_byte_level(tmp_path / "a.gguf", pre="default"))
        assert not caplog.records
        unnamed = Tokenizer.from_gguf(write_byte_level(tmp_path / "b.gguf", pre=None))
    assert "tokenizer.ggml.pre" in caplog.text
    assert unnamed.encode("it's 1234!") == named.encode("it's 1234!")


def test_unknown_kinds_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="'rwkv'") as model:
        Tokenizer.from_gguf(write_vocabulary(tmp_path / "a.gguf", "rwkv", ["a"]))
    assert model.value.hint is not None
    assert "gpt2" in model.value.hint
    with pytest.raises(UnsupportedModelError, match="'brand-new'") as pre:
        Tokenizer.from_gguf(write_byte_level(tmp_path / "b.gguf", pre="brand-new"))
    assert pre.value.hint is not None
    assert "qwen2" in pre.value.hint


def test_lone_surrogates_are_refused(byte_level: Tokenizer) -> None:
    with pytest.raises(RequestError, match="character 2"):
        byte_level.encode("ab\ud800")


@pytest.mark.parametrize("token_id", [-1, 10_000])
def test_ids_outside_the_vocabulary_are_refused(byte_level: Tokenizer, token_id: int) -> None:
    for method in (byte_level.token_text, byte_level.token_bytes, byte_level.is_special):
        with pytest.raises(RequestError, match="outside"):
            method(token_id)
    with pytest.raises(RequestError, match="outside"):
        byte_level.decode([token_id])


def test_pieces_of_special_tokens(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a<|im_end|><think>", parse_special=True)
    assert byte_level.decode(ids) == "a<think>"
    assert byte_level.decode(ids, skip_special=False) == "a<|im_end|><think>"
    assert [byte_level.is_special(token_id) for token_id in ids] == [False, True, False]
    assert byte_level.token_bytes(ids[1]) == b"<|im_end|>"


def test_unused_tokens_are_silent(tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "v.gguf", "gpt2", ["a", "[PAD1]"], kinds=[NORMAL, 5], merges=[], pre="gpt-2")
    assert Tokenizer.from_gguf(path).decode([0, 1, 0]) == "aa"


def test_nameless_tokens_get_names(tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "v.gguf", "gpt2", ["a", "", "b"], merges=[], pre="gpt-2")
    assert Tokenizer.from_gguf(path).token_text(1) == "[EMPTY_1]"


def test_the_space_in_front_goes_where_the_text_begins(pieces: Tokenizer) -> None:
    ids = pieces.encode("ab a")
    assert spell(pieces, ids) == ["<s>", "▁a", "b", "▁a"]
    assert pieces.decode(ids) == "ab a"
    assert pieces.decode(ids, skip_special=False) == "<s> ab a"
    assert pieces.decode(ids[3:]) == "a"
    assert pieces.decode(ids[3:], prompt_ids=ids[:3]) == " a"
    assert pieces.decode(ids[1:], prompt_ids=[1]) == "ab a"


def test_a_space_in_front_of_what_follows_a_special_token(pieces: Tokenizer) -> None:
    assert spell(pieces, pieces.encode("</s>a", add_special=False, parse_special=True)) == ["</s>", "▁a"]


def test_without_space_prefix(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(write_sentencepiece(tmp_path / "v.gguf", add_space_prefix=False))
    assert spell(tokenizer, tokenizer.encode("ab a", add_special=False)) == ["ab", "▁a"]
    assert tokenizer.decode(tokenizer.encode(" a")) == " a"


@given(text=TEXT)
def test_byte_level_round_trip(byte_level: Tokenizer, text: str) -> None:
    assert byte_level.decode(byte_level.encode(text, add_special=False)) == text


@given(text=TEXT)
def test_sentencepiece_round_trip(pieces: Tokenizer, text: str) -> None:
    """Exact but for U+2581, which stands for a space inside of tokens and comes back as one."""
    assert pieces.decode(pieces.encode(text)) == text.replace("▁", " ")


@given(ids=st.lists(st.integers(0, 264), max_size=30), skip_special=st.booleans())
def test_stream_equals_decode(byte_level: Tokenizer, pieces: Tokenizer, ids: list[int], skip_special: bool) -> None:
    for tokenizer in (byte_level, pieces):
        stream = tokenizer.stream(skip_special)
        text = "".join([*map(stream.push, ids), stream.flush()])
        assert text == tokenizer.decode(ids, skip_special)
        kept = [token_id for token_id in ids if not (skip_special and tokenizer.is_special(token_id))]
        whole = b"".join(map(tokenizer.token_bytes, kept))
        assert text == (whole.removeprefix(b" ") if tokenizer is pieces else whole).decode("utf-8", "replace")


def test_a_control_token_at_each_end(tmp_path: Path) -> None:
    tokens, kinds = ["[PAD]", "[CLS]", "[SEP]", "▁a"], [CONTROL, CONTROL, CONTROL, NORMAL]
    path = write_vocabulary(
        tmp_path / "v.gguf", "bert", tokens, kinds=kinds, bos_token_id=1, seperator_token_id=2, add_bos_token=False
    )
    assert Tokenizer.from_gguf(path).encode("A a") == [1, 3, 3, 2]
