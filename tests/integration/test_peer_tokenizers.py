"""Ids, pieces and ends of generation against llama.cpp: every pre-tokenizer, every tokenizer model, hard texts."""

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Trainer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from runtime.tokenizer import Tokenizer
from runtime.tokenizer.pretokenizers import PRE_TOKENIZERS
from tests.support.peer_tokens import read_peer
from tests.support.tokenizer_files import ALPHABET, write_byte_level, write_sentencepiece, write_vocabulary

pytestmark = [pytest.mark.peer, pytest.mark.slow]

SPECIAL = {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"}
PARTS_TEXT = (
    "'s 'S 't 're 'LL ' \" a b A B Hello world fooBar XMLHttp 1 12 123 1234567 ½ ² ٣٤ １２ ! ? ... ?! // < > $ + = ^ ~"
    " ` | ( [ ] \\ _ - # é e\u0301 \u0301 ß ſ я Ж ा न\u093f 中文 、 。 ！ かな カナ 한국 ไทย 😀 👩\u200d👧 \u200d"
    " \ufeff \ufffd \ue000 IMGIMGABZ <sentinel:12> <s> </s> <|im_end|> <think> <0x41> ▁ Ġ \x01 \x7f"
)
PARTS = PARTS_TEXT.split(" ")
SPACES = [" ", "  ", "    ", "\n", "\r\n", "\n\n", "\t", " \n", "\u00a0", "\u3000", "\u2003", "\u2028", "\x85", "\v"]


def hard_texts(seed: int, count: int) -> list[str]:
    """Random strings of awkward parts."""
    source = random.Random(seed)
    pool = PARTS + SPACES * 3
    return ["".join(source.choice(pool) for _ in range(source.randint(1, 25))) for _ in range(count)]


def assert_equal(path: Path, texts: list[str]) -> None:
    """Our tokenizer and llama.cpp's agree on everything."""
    peer = read_peer(path, texts)
    tokenizer = Tokenizer.from_gguf(path)
    for text, expected in zip(texts, peer.ids, strict=True):
        for (add_special, parse_special), ids in expected.items():
            assert tokenizer.encode(text, add_special, parse_special) == ids, (text, add_special, parse_special)
    assert [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)] == peer.pieces
    assert tokenizer.eog_ids == peer.eog_ids


@pytest.fixture(scope="module")
def merges() -> list[str]:
    """Merges over texts that no pre-tokenizer has cut, so that every cut shows in the ids."""
    pytest.importorskip("llama_cpp")
    trainer = Trainer(BPE())
    trainer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    trainer.train_from_iterator(
        hard_texts(0, 3000), BpeTrainer(vocab_size=3000, initial_alphabet=ALPHABET, show_progress=False)
    )
    tokens = sorted(trainer.get_vocab(), key=trainer.get_vocab().__getitem__)
    known: set[str] = set(ALPHABET)
    found = []
    for token in tokens:
        cuts = [at for at in range(1, len(token)) if token[:at] in known and token[at:] in known]
        if token not in known and token not in SPECIAL and cuts:
            found.append(f"{token[: cuts[0]]} {token[cuts[0] :]}")
            known.add(token)
    return found


@pytest.mark.parametrize("pre", sorted(name for name, rules in PRE_TOKENIZERS.items() if rules.byte_level))
def test_byte_level(tmp_path: Path, merges: list[str], pre: str) -> None:
    assert_equal(write_byte_level(tmp_path / "v.gguf", merges, pre=pre), hard_texts(sum(map(ord, pre)), 150))


@pytest.mark.parametrize("ties", [1, 5, 500])
@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(tmp_path: Path, ties: int, prefix: bool) -> None:
    pytest.importorskip("llama_cpp")
    source = random.Random(ties)
    letters = ["a", "b", "▁", "é", "中", "\n"]
    found = {"".join(source.choice(letters) for _ in range(source.randint(1, 5))) for _ in range(400)}
    pieces = [(piece, -float(rank // ties)) for rank, piece in enumerate(sorted(found))]
    path = write_sentencepiece(
        tmp_path / "v.gguf", pieces, user_defined=["<think>"], add_space_prefix=prefix, add_eos_token=prefix
    )
    texts = ["".join(source.choice([*"ab é中\nx", "  ", "<s>", "<think>"]) for _ in range(25)) for _ in range(400)]
    assert_equal(path, texts + hard_texts(ties, 200))


@pytest.mark.parametrize("lowercase", [True, False])
def test_wordpiece(tmp_path: Path, lowercase: bool) -> None:
    pytest.importorskip("llama_cpp")
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "▁hello", "▁wor", "ld", "▁中", "▁a", "b", "▁e", "▁é"]
    tokens += [f"▁{mark}" for mark in "!?.,<>$'\"()1"] + list("oxyzABfr123")
    path = write_vocabulary(
        tmp_path / "v.gguf", "bert", tokens, kinds=[3] * 5 + [1] * (len(tokens) - 5), architecture="bert",
        bos_token_id=2, eos_token_id=3, unknown_token_id=1, seperator_token_id=3, normalizer__lowercase=lowercase,
    )  # fmt: skip
    assert_equal(path, hard_texts(7, 500))


@pytest.mark.parametrize("merge_spaces", [True, False])
def test_unigram(tmp_path: Path, merge_spaces: bool) -> None:
    pytest.importorskip("llama_cpp")
    source = random.Random(merge_spaces)
    found = {"".join(source.choice("ab▁é中12") for _ in range(source.randint(1, 4))) for _ in range(300)}
    tokens = ["<pad>", "</s>", "<unk>", "<think>", *sorted(found)]
    path = write_vocabulary(
        tmp_path / "v.gguf", "t5", tokens, kinds=[3, 3, 2, 4] + [1] * len(found), architecture="t5",
        scores=[0.0] * 4 + [-source.randint(1, 40) / 4 for _ in found], eos_token_id=1, unknown_token_id=2,
        add_space_prefix=True, remove_extra_whitespaces=merge_spaces,
    )  # fmt: skip
    texts = ["".join(source.choice("ab é中12x") for _ in range(30)) for _ in range(300)]
    assert_equal(path, texts + hard_texts(8, 200))


def test_vocabularies_beside_the_repository(shared_data: Path) -> None:
    pytest.importorskip("llama_cpp")
    for path in sorted((shared_data / "tokenizer_cases").glob("*.gguf")):
        assert_equal(path, hard_texts(len(path.name), 200))
