"""SentencePiece's byte-pair encoding (`tokenizer.ggml.model` = "llama"): merges by score, bytes where no token fits.

Of all neighbours that together are a token, the pair whose token scores best is joined, the leftmost of equals, until
no two neighbours are a token (as llama.cpp's SPM tokenizer). Knows nothing about special tokens.

A general BPE engine ranks pairs, not tokens, and cannot express "leftmost of equal scores"; this is exact. It is fast
because a text falls apart at every pair of characters that stands side by side in no token: no merge can cross it, so
the parts, mostly words, are merged once each and remembered.
"""

from collections.abc import Iterator
from functools import cached_property
from heapq import heappop, heappush
from itertools import pairwise
from typing import Final

from runtime.tokenizer.vocabulary import SPACE, Vocabulary

_CACHED_PARTS: Final = 1 << 16
_CACHED_CHARACTERS: Final = 64


class SentencePieceBPE:
    """Implements `runtime.tokenizer.base.Algorithm`."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._ids = vocabulary.ids
        self._scores = vocabulary.scores.tolist()
        self._add_space_prefix = vocabulary.add_space_prefix
        self._unk_id = vocabulary.unk_id
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str, *, after_special: bool) -> list[int]:
        """Ids of plain text; a space is put in front of what follows a special token or begins the text."""
        if self._add_space_prefix and after_special:
            text = " " + text
        ids: list[int] = []
        for part in self._parts(text.replace(" ", SPACE)):
            ids.extend(self._encode_part(part))
        return ids

    def text_bytes(self, token: str) -> bytes:
        """The bytes a normal token stands for."""
        return token.replace(SPACE, " ").encode()

    @cached_property
    def _neighbours(self) -> set[tuple[str, str]]:
        """Every two characters that stand side by side in some token."""
        pairs: set[tuple[str, str]] = set()
        for token in self._ids:
            pairs.update(pairwise(token))
        return pairs

    def _parts(self, text: str) -> Iterator[str]:
        """Cuts `text` where no merge can reach across."""
        neighbours = self._neighbours
        start = 0
        for end, pair in enumerate(pairwise(text), 1):
            if pair not in neighbours:
                yield text[start:end]
                start = end
        yield text[start:]

    def _encode_part(self, part: str) -> list[int]:
        found = self._cache.get(part)
        if found is None:
            found = [token_id for piece in self._merge(part) for token_id in self._piece_ids(piece)]
            if len(part) <= _CACHED_CHARACTERS:
                if len(self._cache) >= _CACHED_PARTS:
                    self._cache.clear()
                self._cache[part] = found
        return found

    def _merge(self, part: str) -> list[str]:
        """The pieces that are left when no two neighbours are a token."""
        pieces = list(part)
        before = list(range(-1, len(pieces) - 1))
        after = [*range(1, len(pieces)), -1]
        queue: list[tuple[float, int, int, str]] = []

        def offer(left: int, right: int) -> None:
            joined = pieces[left] + pieces[right]
            token_id = self._ids.get(joined)
            if token_id is not None:
                heappush(queue, (-self._scores[token_id], left, right, joined))

        for right in range(1, len(pieces)):
            offer(right - 1, right)
        while queue:
            _, left, right, joined = heappop(queue)
            # a piece that was merged since is empty or longer, so this offer is no longer good
            if not pieces[left] or not pieces[right] or len(pieces[left]) + len(pieces[right]) != len(joined):
                continue
            pieces[left], pieces[right] = joined, ""
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
                offer(left, after[left])
            if before[left] >= 0:
                offer(before[left], left)
        return [piece for piece in pieces if piece]

    def _piece_ids(self, piece: str) -> list[int]:
        """The token, or the bytes of a character that is none; the unknown token where a byte has none either."""
        token_id = self._ids.get(piece)
        if token_id is not None:
            return [token_id]
        found = [self._ids.get(f"<0x{byte:02X}>", self._unk_id) for byte in piece.encode()]
        return [token_id for token_id in found if token_id is not None]
