"""Byte-pair encoding by a list of merges (`tokenizer.ggml.model` = "gpt2" and "gemma4"), on the `tokenizers` library.

Knows nothing about special tokens. Two spellings of text: GPT-2's alphabet, where every byte is a printable character,
and plain UTF-8 with byte tokens `<0xZZ>` for what the vocabulary lacks.
"""

import re
from functools import cache
from itertools import repeat
from typing import Final

from tokenizers import Regex
from tokenizers import Tokenizer as WordEncoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence
from tokenizers.pre_tokenizers import PreTokenizer as Splitter
from tokenizers.pre_tokenizers import Split as SplitBy

from offload.gguf import GGUFFile
from runtime.tokenizer.pretokenizers import PreTokenizer
from runtime.tokenizer.vocabulary import SPACE, Vocabulary, wrong

MERGES_KEY: Final = "tokenizer.ggml.merges"


class ByteLevelBPE:
    """GPT-2's: text is cut by the patterns, spelled in the byte alphabet and merged. Implements `Algorithm`."""

    def __init__(self, gguf: GGUFFile, vocabulary: Vocabulary, pre_tokenizer: PreTokenizer) -> None:
        self._encoder = _word_encoder(gguf, vocabulary, pre_tokenizer)

    def encode(self, text: str, *, after_special: bool) -> list[int]:
        """Ids of plain text; what came before it does not matter."""
        ids: list[int] = self._encoder.encode(text, add_special_tokens=False).ids
        return ids

    def text_bytes(self, token: str) -> bytes:
        """Each character's byte; characters outside of the alphabet stand for themselves."""
        alphabet = byte_alphabet()
        return b"".join(alphabet.get(character) or character.encode() for character in token)


class PlainBPE:
    """Merges over UTF-8 text, lines apart, as Gemma 4 has them. Implements `Algorithm`."""

    def __init__(self, gguf: GGUFFile, vocabulary: Vocabulary, pre_tokenizer: PreTokenizer) -> None:
        self._encoder = _word_encoder(gguf, vocabulary, pre_tokenizer)
        self._escape_spaces = pre_tokenizer.escape_spaces
        self._newline_ids = (
            {text: token_id for text, token_id in vocabulary.ids.items() if not text.strip("\n")}
            if pre_tokenizer.newline_tokens
            else {}
        )

    def encode(self, text: str, *, after_special: bool) -> list[int]:
        """Ids of plain text; what came before it does not matter."""
        if self._escape_spaces:
            text = text.replace(" ", SPACE)
        ids: list[int] = []
        for piece in re.split("(\n+)", text) if self._newline_ids else [text]:
            newlines = self._newline_ids.get(piece)
            ids.extend(self._encoder.encode(piece, add_special_tokens=False).ids if newlines is None else [newlines])
        return ids

    def text_bytes(self, token: str) -> bytes:
        """The token's text with spaces."""
        return (token.replace(SPACE, " ") if self._escape_spaces else token).encode()


@cache
def byte_alphabet() -> dict[str, bytes]:
    """GPT-2's spelling of bytes: printable Latin-1 characters are themselves, the rest U+0100 and on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + at) for at, byte in enumerate(rest)}
    return {character: bytes([byte]) for byte, character in characters.items()}


def _word_encoder(gguf: GGUFFile, vocabulary: Vocabulary, pre_tokenizer: PreTokenizer) -> WordEncoder:
    """The library's tokenizer for one vocabulary; ModelFormatError if the merges do not fit it."""
    merges = _read_merges(gguf)
    try:
        model = BPE(
            vocabulary.ids,
            merges,
            ignore_merges=pre_tokenizer.ignore_merges,
            byte_fallback=not pre_tokenizer.byte_level,
        )
    except Exception as error:  # the library raises nothing narrower
        raise wrong(gguf, MERGES_KEY, _what_is_wrong(vocabulary, merges) or f"cannot be used: {error}") from error
    encoder = WordEncoder(model)
    steps: list[Splitter] = [SplitBy(Regex(split.pattern), split.behavior) for split in pre_tokenizer.splits]
    if pre_tokenizer.byte_level:
        steps.append(ByteLevel(add_prefix_space=False, use_regex=False))
        missing = [character for character in byte_alphabet() if character not in vocabulary.ids]
        if missing:  # such bytes give no token, but what stands around them must not merge over the gap
            steps.append(SplitBy(Regex("[" + "".join(rf"\x{{{ord(c):X}}}" for c in missing) + "]"), "isolated"))
    encoder.pre_tokenizer = Sequence(steps)
    return encoder


def _read_merges(gguf: GGUFFile) -> list[tuple[str, str]]:
    """The merges as pairs, best first; of a pair that is listed twice the first counts."""
    array = gguf.get_strings(MERGES_KEY, ()) if pre_name(gguf) == "kimi-k2" else gguf.get_strings(MERGES_KEY)
    lines = list(array)
    if len(set(lines)) < len(lines):
        lines = list(dict.fromkeys(lines))
    return [(left, right) for left, _, right in map(str.partition, lines, repeat(" "))]


def _what_is_wrong(vocabulary: Vocabulary, merges: list[tuple[str, str]]) -> str | None:
    """The first merge that is not two tokens which together are a token, in words."""
    ids = vocabulary.ids
    for left, right in merges:
        if left not in ids or right not in ids or left + right not in ids:
            return f"holds '{left} {right}': not two tokens that together are a token"
    return None


def pre_name(gguf: GGUFFile) -> str:
    """The name of the pre-tokenizer, empty if the file gives none."""
    return gguf.get_str("tokenizer.ggml.pre", "")
