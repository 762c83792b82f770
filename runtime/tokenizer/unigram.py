"""SentencePiece's unigram model (`tokenizer.ggml.model` = "t5"): the tokens of highest total score, after normalising.

As llama.cpp's UGM tokenizer: the file's character map, spaces as U+2581, then a Viterbi search. Knows nothing about
special tokens. Normalisation loses what the map folds, so the text cannot always be got back from the ids.
"""

import math
from typing import Final

import numpy as np

from offload.gguf import GGUFFile
from runtime.tokenizer.charsmap import CharacterMap
from runtime.tokenizer.vocabulary import SPACE, TokenKind, Vocabulary

_UNKNOWN_PENALTY: Final = 10.0
"""How much worse than the worst token an unknown character scores."""


class Unigram:
    """Implements `runtime.tokenizer.base.Algorithm`."""

    def __init__(self, gguf: GGUFFile, vocabulary: Vocabulary) -> None:
        kinds = vocabulary.kinds
        scores = vocabulary.scores.copy()
        normal = (kinds & TokenKind.NORMAL) != 0
        self._unknown_score = float(scores[normal].min() if normal.any() else 0.0) - _UNKNOWN_PENALTY
        scores[(kinds & TokenKind.USER_DEFINED) != 0] = 0.0
        usable = np.flatnonzero(kinds & (TokenKind.NORMAL | TokenKind.USER_DEFINED | TokenKind.UNUSED)).tolist()
        self._tokens = {vocabulary.tokens[token_id]: (float(scores[token_id]), token_id) for token_id in usable}
        self._longest = max(map(len, self._tokens), default=0)
        self._unk_id = vocabulary.unk_id
        self._add_space_prefix = vocabulary.add_space_prefix
        self._merge_spaces = gguf.get_bool("tokenizer.ggml.remove_extra_whitespaces", False)
        user_defined = np.flatnonzero(kinds & TokenKind.USER_DEFINED).tolist()
        self._character_map = CharacterMap(gguf, [vocabulary.tokens[token_id] for token_id in user_defined])

    def encode(self, text: str, *, after_special: bool) -> list[int]:
        """Ids of plain text; neighbouring unknown characters share one unknown token."""
        return self._best_path(self._normalized(text))

    def text_bytes(self, token: str) -> bytes:
        """The token's text with spaces."""
        return token.replace(SPACE, " ").encode()

    def _normalized(self, text: str) -> str:
        """The text after the character map, a mark for each space or, with merging, one at each word's beginning."""
        mapped = self._character_map.apply(text)
        if self._merge_spaces:
            return "".join(SPACE + word for word in mapped.split(" ") if word)
        prefix = SPACE if self._add_space_prefix and mapped.strip(" ") else ""
        spaces = len(mapped) - len(mapped.lstrip(" "))
        return SPACE * spaces + prefix + mapped[spaces:].replace(" ", SPACE)

    def _best_path(self, text: str) -> list[int]:
        """Viterbi: the best way to reach each character, then back from the end."""
        best = [0.0] + [-math.inf] * len(text)
        steps: list[tuple[int, int | None]] = [(0, None)] * (len(text) + 1)  # where the last token begins, and its id
        for start in range(len(text)):
            reached, known = best[start], False
            for end in range(start + 1, min(start + self._longest, len(text)) + 1):
                token = self._tokens.get(text[start:end])
                if token is not None:
                    known = known or end == start + 1
                    if reached + token[0] > best[end]:
                        best[end], steps[end] = reached + token[0], (start, token[1])
            if not known and reached + self._unknown_score > best[start + 1]:
                best[start + 1], steps[start + 1] = reached + self._unknown_score, (start, self._unk_id)
        ids: list[int | None] = []
        end = len(text)
        while end > 0:
            end, token_id = steps[end]
            if not (ids and token_id == ids[-1] == self._unk_id):
                ids.append(token_id)
        return [token_id for token_id in reversed(ids) if token_id is not None]
