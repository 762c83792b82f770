"""What every tokenization algorithm offers: ids for plain text, and the bytes of a token's text.

Knows nothing about special tokens, BOS or EOS: those are `runtime.tokenizer.tokenizer`'s.
"""

from typing import Protocol


class Algorithm(Protocol):
    """One of the ways to cut text into tokens; safe to share between threads."""

    def encode(self, text: str, *, after_special: bool) -> list[int]:
        """Ids of plain, non-empty text; `after_special`: it begins the text or follows a special token."""
        ...

    def text_bytes(self, token: str) -> bytes:
        """The bytes that a token of kind NORMAL stands for."""
        ...
