"""An expert on its way from flash into a slot: the pieces it comes in, and what of them is still to come.

Knows nothing about who needs it, nor about what an expert computes or how its bytes are laid out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from offload.flash import Extent, Priority, Read

Unpack = Callable[[NDArray[np.uint8], NDArray[np.uint8]], None]
"""(bytes that were read, slot): puts them into the slot."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of a file that belong to a part of an expert."""

    part: int
    extent: Extent
    unpack: Unpack


class Bundles(Protocol):
    """Where experts come from."""

    def pieces(self, layer: int, expert: int) -> Sequence[Piece]:
        """All pieces of an expert, part after part; every part has at least one. Asked for at every load: be quick."""
        ...


class Load:
    """An expert that is brought into a slot, because a step waits for it or because one may.

    `left`: pieces of each part that are still to come; `failed`: those that could not be read while nobody waited.
    """

    __slots__ = (
        *("expert", "failed", "is_demanded", "is_dropped", "is_guess", "layer", "left", "num_bytes", "pieces"),
        *("reads", "slot"),
    )

    def __init__(
        self, layer: int, expert: int, slot: int, pieces: Sequence[Piece], parts: int, priority: Priority
    ) -> None:
        self.layer, self.expert, self.slot = layer, expert, slot
        self.pieces = pieces
        self.left = [0] * parts
        self.num_bytes = 0
        for piece in pieces:
            self.left[piece.part] += 1
            self.num_bytes += piece.extent.num_bytes
        self.reads: list[tuple[Piece, Read]] = []
        self.failed: list[Piece] = []
        self.is_demanded = priority is Priority.DEMAND
        self.is_guess = priority is Priority.PREFETCH
        self.is_dropped = False
