"""The vocabulary of a GGUF file, read and checked once: texts, kinds, scores, special ids and flags.

Knows nothing about how text is cut into tokens. Invariants: texts are unique and valid UTF-8, `ids[tokens[i]] == i`,
`kinds` and `scores` have one entry a token, and every special id lies inside the vocabulary.

Keys and defaults are those of llama.cpp (`llama_vocab::load`); `docs/gguf.md` of ggml names the keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntFlag
from typing import Final

import numpy as np
from numpy.typing import NDArray

from offload.errors import ModelFormatError
from offload.gguf import GGUFFile

SPACE: Final = "▁"
"""What a space is written as inside of tokens, except in GPT-2's byte alphabet."""

TOKENS_KEY: Final = "tokenizer.ggml.tokens"
FIM_KEYS: Final = (
    *((role, f"fim_{role}") for role in ("pre", "suf", "mid", "pad", "rep", "sep")),
    *(("pre", "prefix"), ("suf", "suffix"), ("mid", "middle")),  # names of older files
)
"""Role of a fill-in-the-middle token and the middle part of its key."""


class TokenKind(IntFlag):
    """What a token stands for; a token may be control and user-defined at once."""

    UNDEFINED = 0
    UNKNOWN = 1
    UNUSED = 2
    NORMAL = 4
    CONTROL = 8
    USER_DEFINED = 16
    BYTE = 32


SPECIAL: Final = TokenKind.CONTROL | TokenKind.UNKNOWN
"""Kinds that are no text: hidden by `skip_special`, matched in a text only with `parse_special`."""

_KIND_OF_FILE_TYPE: Final = np.array([0, 4, 1, 8, 16, 2, 32], dtype=np.uint8)
"""`tokenizer.ggml.token_type` (1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte) -> TokenKind."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a tokenizer model or pre-tokenizer implies where the file says nothing."""

    bos_id: int | None = None
    eos_id: int | None = None
    unk_id: int | None = None
    sep_id: int | None = None
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool = False


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """`add_bos` and `add_eos` ask for `bos_id` in front of a text and `closing_id` behind it.

    `kinds` holds TokenKind bits, shape (tokens,), as `scores`; `source` is the file's name for messages.
    `fim_ids` are the fill-in-the-middle tokens that the file names, by role (`pre suf mid pad rep sep`).
    """

    source: str
    tokens: list[str]
    ids: dict[str, int]
    kinds: NDArray[np.uint8]
    scores: NDArray[np.float64]
    bos_id: int | None
    eos_id: int | None
    eot_id: int | None
    eom_id: int | None
    unk_id: int | None
    sep_id: int | None
    closing_id: int | None
    fim_ids: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool

    def __len__(self) -> int:
        return len(self.tokens)

    def byte_tokens(self) -> dict[int, int]:
        """Token id -> byte of every byte token `<0xZZ>`; ModelFormatError for one that is written otherwise."""
        found = {}
        for token_id in np.flatnonzero(self.kinds & TokenKind.BYTE).tolist():
            text = self.tokens[token_id]
            digits = text[3:5]
            if len(text) != 6 or text != f"<0x{digits}>" or not set(digits) <= set("0123456789abcdefABCDEF"):
                raise ModelFormatError(
                    f"{self.source}: {TOKENS_KEY}[{token_id}] is a byte token written {text!r}, not <0xZZ>",
                    hint="use another conversion of this model",
                )
            found[token_id] = int(digits, 16)
        return found


def read_vocabulary(gguf: GGUFFile, defaults: Defaults) -> Vocabulary:
    """Reads and checks the vocabulary; ModelFormatError names file and key of what is wrong."""
    tokens = _read_tokens(gguf)
    ids = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(ids) != len(tokens):
        twice = next(token_id for token_id, text in enumerate(tokens) if ids[text] != token_id)
        raise wrong(gguf, TOKENS_KEY, f"holds {tokens[twice]!r} twice, as {twice} and as {ids[tokens[twice]]}")

    def special(name: str, default: int | None = None) -> int | None:
        inside = default if default is not None and default < len(tokens) else None
        return gguf.get_int(f"tokenizer.ggml.{name}_token_id", inside, minimum=0, maximum=len(tokens) - 1)

    eos_id = special("eos", defaults.eos_id)
    return Vocabulary(
        source=str(gguf.path),
        tokens=tokens,
        ids=ids,
        kinds=_read_kinds(gguf, len(tokens)),
        scores=_read_scores(gguf, len(tokens)),
        bos_id=special("bos", defaults.bos_id),
        eos_id=eos_id,
        eot_id=special("eot"),
        eom_id=special("eom"),
        unk_id=special("unknown", defaults.unk_id),
        sep_id=special("seperator", defaults.sep_id),  # the format's own spelling
        closing_id=eos_id,
        fim_ids={role: found for role, name in FIM_KEYS if (found := special(name)) is not None},
        add_bos=gguf.get_bool("tokenizer.ggml.add_bos_token", defaults.add_bos),
        add_eos=gguf.get_bool("tokenizer.ggml.add_eos_token", defaults.add_eos),
        add_space_prefix=gguf.get_bool("tokenizer.ggml.add_space_prefix", defaults.add_space_prefix),
    )


def _read_tokens(gguf: GGUFFile) -> list[str]:
    tokens = list(gguf.get_strings(TOKENS_KEY))
    if not tokens:
        raise wrong(gguf, TOKENS_KEY, "is empty")
    try:
        "".join(tokens).encode()
    except UnicodeEncodeError:
        bad = next(token_id for token_id, text in enumerate(tokens) if not _is_utf8(text))
        raise wrong(gguf, f"{TOKENS_KEY}[{bad}]", f"is not valid UTF-8: {tokens[bad]!r}") from None
    if "" in tokens:  # llama.cpp gives nameless tokens these names too
        tokens = [text or f"[EMPTY_{token_id}]" for token_id, text in enumerate(tokens)]
    return tokens


def _read_kinds(gguf: GGUFFile, count: int) -> NDArray[np.uint8]:
    key = "tokenizer.ggml.token_type"
    types = gguf.get_ints(key, None)
    if types is None:
        return np.full(count, TokenKind.NORMAL, dtype=np.uint8)
    _check_count(gguf, key, len(types), count)
    in_range = (types >= 1) & (types <= 6)
    kinds: NDArray[np.uint8] = _KIND_OF_FILE_TYPE[np.where(in_range, types, 0)]
    return kinds


def _read_scores(gguf: GGUFFile, count: int) -> NDArray[np.float64]:
    key = "tokenizer.ggml.scores"
    scores = gguf.get_floats(key, None)
    if scores is None:
        return np.zeros(count)
    _check_count(gguf, key, len(scores), count)
    if np.isnan(scores).any():
        raise wrong(gguf, f"{key}[{int(np.flatnonzero(np.isnan(scores))[0])}]", "is not a number")
    return scores


def _check_count(gguf: GGUFFile, key: str, found: int, count: int) -> None:
    if found != count:
        raise wrong(gguf, key, f"has {found} entries for {count} tokens")


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def wrong(gguf: GGUFFile, key: str, problem: str) -> ModelFormatError:
    """The error for a metadata key of this file that is not what it should be."""
    return ModelFormatError(f"{gguf.path}: {key} {problem}", hint="use another conversion of this model")
