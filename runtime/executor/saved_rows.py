"""A KV cache whose rows can be told as bytes and put into another: in whole blocks of tokens, all layers together.

Knows nothing about where the bytes go. Invariant: a block's bytes depend on its rows alone, not on a cache's capacity.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class RowsLayout:
    """How rows are told as bytes: `block_bytes` for `block_tokens` tokens. Layouts of one name mean the same bytes."""

    name: str
    block_tokens: int
    block_bytes: int


@runtime_checkable
class SavedRows(Protocol):
    """A `KVHandle` whose rows can be saved."""

    @property
    def rows_layout(self) -> RowsLayout:
        """Of the blocks."""
        ...

    @property
    def final_tokens(self) -> int:
        """Tokens at the start whose rows do not change any more, whatever comes behind them."""
        ...

    @property
    def blocks_at_once(self) -> int | None:
        """How many blocks may be imported in any order, before others are; None for any number."""
        ...

    def export_block(self, index: int, out: NDArray[np.uint8]) -> None:
        """Copies the rows of a block, all of whose tokens are final, to `out`, (block_bytes,)."""
        ...

    def import_block(self, index: int, data: NDArray[np.uint8]) -> None:
        """Puts the bytes of a block, (block_bytes,), where its rows belong; they count when `restored` says so.

        Several threads may import different blocks at once.
        """
        ...

    def restored(self, length: int) -> None:
        """The first `length` tokens are held from now on: their blocks were imported, or held before."""
        ...
