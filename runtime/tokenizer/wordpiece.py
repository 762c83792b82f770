"""BERT's WordPiece (`tokenizer.ggml.model` = "bert"): words by whitespace and punctuation, then longest tokens first.

As llama.cpp's WPM tokenizer, which writes U+2581 in front of a word's first piece where BERT writes ## in front of the
others. Knows nothing about special tokens. What a word holds beside letters (controls, accents if the model strips
them) is dropped, so the text cannot be got back from the ids.
"""

import unicodedata
from collections.abc import Iterator
from typing import Final

from offload.gguf import GGUFFile
from runtime.tokenizer.vocabulary import SPACE, Vocabulary

WHITESPACE: Final = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | frozenset(
    map(chr, range(0x2000, 0x200B))
)
_IDEOGRAPHS: Final = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B920, 0x2CEAF),  # as the published tokenizer has it, though the block begins at 2B820
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


class WordPiece:
    """Implements `runtime.tokenizer.base.Algorithm`."""

    def __init__(self, gguf: GGUFFile, vocabulary: Vocabulary) -> None:
        self._ids = vocabulary.ids
        self._unk_id = vocabulary.unk_id
        self._longest = max(map(len, vocabulary.tokens))
        self._lowercase = gguf.get_bool("tokenizer.ggml.normalizer.lowercase", True)
        self._strip_accents = gguf.get_bool("tokenizer.ggml.normalizer.strip_accents", self._lowercase)

    def encode(self, text: str, *, after_special: bool) -> list[int]:
        """Ids of plain text; a word that does not fall into tokens is the unknown token."""
        unknown = [] if self._unk_id is None else [self._unk_id]
        return [token_id for word in self._words(text) for token_id in self._pieces(SPACE + word) or unknown]

    def text_bytes(self, token: str) -> bytes:
        """The token's text; the mark of a word's beginning is a space."""
        return token.replace(SPACE, " ").encode()

    def _pieces(self, word: str) -> list[int]:
        """The longest token at each position; empty if at some position there is none."""
        ids: list[int] = []
        start = 0
        while start < len(word):
            for end in range(min(len(word), start + self._longest), start, -1):
                token_id = self._ids.get(word[start:end])
                if token_id is not None:
                    break
            else:
                return []
            ids.append(token_id)
            start = end
        return ids

    def _words(self, text: str) -> Iterator[str]:
        """Runs of what is neither whitespace nor punctuation, and every punctuation mark and ideograph by itself."""
        word = ""
        for character in self._normalized(text):
            if character in WHITESPACE or _stands_alone(character):
                if word:
                    yield word
                    word = ""
                if character not in WHITESPACE:
                    yield character
            else:
                word += character
        if word:
            yield word

    def _normalized(self, text: str) -> Iterator[str]:
        """Characters without controls and, where the model says so, accents and case."""
        for original in text:
            character = unicodedata.normalize("NFD", original)[0] if self._strip_accents else original
            category = unicodedata.category(character)
            if character in WHITESPACE:
                yield character
            elif character in "\0\ufffd" or category in ("Cc", "Cf", "Cs", "Co"):
                continue
            elif not (self._strip_accents and category[0] == "M"):
                yield character.lower()[0] if self._lowercase else character


def _stands_alone(character: str) -> bool:
    category = unicodedata.category(character)[0]
    if category == "P" or (category == "S" and character < "\x7f"):
        return True
    return any(first <= ord(character) <= last for first, last in _IDEOGRAPHS)
