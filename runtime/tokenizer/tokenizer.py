"""The tokenizer of a model: special tokens, BOS and EOS around one of several algorithms for the text between them.

Knows nothing about models beyond the vocabulary in their file. Invariants: ids are those llama.cpp gives for the same
file and text; the texts of a stream, joined, equal `decode` of its ids.
"""

import logging
import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from offload.errors import RequestError
from offload.gguf import GGUFFile
from runtime.tokenizer.base import Algorithm
from runtime.tokenizer.factory import load
from runtime.tokenizer.special_tokens import SpecialToken, end_of_generation, partition, special_tokens
from runtime.tokenizer.stream import StreamDecoder
from runtime.tokenizer.vocabulary import SPECIAL, TokenKind, Vocabulary

logger = logging.getLogger("strata.tokenizer")


class Tokenizer:
    """Text to ids and back; `add_bos` and `add_eos` say what `encode` puts around a text. Safe to share."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        algorithm: Algorithm,
        specials: Sequence[SpecialToken],
        kinds: NDArray[np.uint8],
        eog_ids: frozenset[int],
    ) -> None:
        """Use `from_gguf`. `kinds` are TokenKind bits, shape (tokens,)."""
        self.vocab_size = len(vocabulary)
        self.bos_id = vocabulary.bos_id
        self.eos_id = vocabulary.eos_id
        self.eog_ids = eog_ids
        self.add_bos = vocabulary.add_bos and vocabulary.bos_id is not None
        self.add_eos = vocabulary.add_eos and vocabulary.closing_id is not None
        self._opening = [vocabulary.bos_id] if vocabulary.add_bos and vocabulary.bos_id is not None else []
        self._closing = [vocabulary.closing_id] if vocabulary.add_eos and vocabulary.closing_id is not None else []
        self._vocabulary = vocabulary
        self._algorithm = algorithm
        self._specials = specials
        self._kinds = kinds.tobytes()
        self._byte_values = vocabulary.byte_tokens()
        self._pieces: dict[int, bytes] = {}

    @classmethod
    def from_gguf(cls, source: str | os.PathLike[str] | GGUFFile) -> "Tokenizer":
        """From a file or an open one; it may hold a vocabulary alone.

        ModelFormatError if the vocabulary is not sound, UnsupportedModelError if its kind is not known.
        """
        if not isinstance(source, GGUFFile):
            with GGUFFile.open(source) as gguf:
                return cls.from_gguf(gguf)
        vocabulary, algorithm = load(source)
        if vocabulary.add_bos and vocabulary.bos_id is None:
            logger.warning("%s asks for a BOS token and names none; texts begin without one", source.path)
        eog_ids, kinds = end_of_generation(vocabulary)
        return cls(vocabulary, algorithm, special_tokens(source, vocabulary, kinds), kinds, eog_ids)

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """The ids of `text`.

        `add_special` puts BOS and EOS around it where the model wants them; `parse_special` reads control tokens that
        are written out in the text as tokens, not as characters. RequestError for a lone surrogate.
        """
        surrogate = next((at for at, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
        if surrogate is not None:
            raise RequestError(
                f"character {surrogate} of the text is the lone surrogate {text[surrogate]!a}, which is no character",
                hint="send valid Unicode",
            )
        ids = self._opening.copy() if add_special else []
        after_special = True
        for fragment in partition(text, self._specials, parse_special=parse_special):
            if isinstance(fragment, int):
                ids.append(fragment)
                after_special = True
            else:
                ids.extend(self._algorithm.encode(fragment, after_special=after_special))
                after_special = False
        return ids + self._closing if add_special else ids

    def decode(self, ids: Sequence[int], skip_special: bool = True, *, prompt_ids: Sequence[int] = ()) -> str:
        """The text of `ids`, U+FFFD for bytes that are not UTF-8; `skip_special` leaves control tokens out.

        SentencePiece vocabularies that begin every text with a space lose it again, unless `prompt_ids`, which come
        before, hold text already.
        """
        decoder = self.stream(skip_special, prompt_ids=prompt_ids)
        return "".join([*map(decoder.push, ids), decoder.flush()])

    def stream(self, skip_special: bool = True, *, prompt_ids: Sequence[int] = ()) -> StreamDecoder:
        """A decoder to push ids into one by one; `prompt_ids` as for `decode`."""
        piece = self._text_piece if skip_special else self.token_bytes
        strip_space = self._vocabulary.add_space_prefix and not any(map(piece, prompt_ids))
        return StreamDecoder(piece, strip_space=strip_space)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, a special token's name included; RequestError for an id outside the vocabulary."""
        found = self._pieces.get(token_id)
        if found is None:
            found = self._pieces[token_id] = self._read_piece(token_id)
        return found

    def token_text(self, token_id: int) -> str:
        """The token as the file's vocabulary spells it; RequestError for an id outside the vocabulary."""
        self._check_id(token_id)
        return self._vocabulary.tokens[token_id]

    def is_special(self, token_id: int) -> bool:
        """Whether the token is control or unknown, so no text; RequestError for an id outside the vocabulary."""
        self._check_id(token_id)
        return bool(self._kinds[token_id] & SPECIAL)

    def _text_piece(self, token_id: int) -> bytes:
        return b"" if self.is_special(token_id) else self.token_bytes(token_id)

    def _read_piece(self, token_id: int) -> bytes:
        text, kind = self.token_text(token_id), self._kinds[token_id]
        if kind & (SPECIAL | TokenKind.USER_DEFINED):
            return text.encode()
        if kind & TokenKind.BYTE:
            return bytes([self._byte_values[token_id]])
        return self._algorithm.text_bytes(text) if kind & TokenKind.NORMAL else b""

    def _check_id(self, token_id: int) -> None:
        if not 0 <= token_id < self.vocab_size:
            raise RequestError(f"token id {token_id} is outside of the vocabulary of {self.vocab_size} tokens")
