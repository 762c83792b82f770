"""Token bytes to text, piece by piece, without ever showing half a character.

Knows nothing about vocabularies. Invariant: whatever the pieces, all that `push` and `flush` return, joined, is
`bytes.decode("utf-8", "replace")` of the joined bytes, the one leading space removed where that was asked for.
"""

import codecs
from collections.abc import Callable


class StreamDecoder:
    """The detokeniser of one answer; at most three bytes of an unfinished character are held back."""

    def __init__(self, piece: Callable[[int], bytes], *, strip_space: bool = False) -> None:
        """`piece` gives a token's bytes; `strip_space` drops one space in front of the first text."""
        self._piece = piece
        self._strip_space = strip_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that is certain once this token is there; may be empty."""
        data = self._piece(token_id)
        if self._strip_space and data:
            self._strip_space = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What an unfinished character at the end comes to: U+FFFD, or nothing if there is none."""
        return self._decoder.decode(b"", final=True)
