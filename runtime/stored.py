"""The bundles of a model from its store: the reads that bring them, each checked before it is used.

Bytes that are wrong are read again, and packed from the GGUF if they stay so: what reaches a slot is always what the
GGUF says. Knows nothing about slots beyond the order of an expert's parts in them, one behind the other.
"""

import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.isa import ISA
from cpu_kernels.tuning import Tuning
from offload.closing import Closing
from offload.errors import FlashError, ModelFormatError
from offload.expert_load import Piece
from offload.flash import Extent
from offload.gguf import GGUFFile
from offload.gguf_source import ByteSource
from offload.store import Store
from runtime.architectures.base import Model
from runtime.model_store import StoredPiece, StorePlan, plan_store
from runtime.packing import BundlePacker

log = logging.getLogger("strata.store")


class StoredBundles(Closing):
    """A `streamed.BundleSource` from `store`, which belongs to this from now on.

    `plan` is the store's, `packer` reads the model it was made from. Layers are counted among those that have bundles;
    a dense one has one expert.
    """

    def __init__(self, store: Store, plan: StorePlan, packer: BundlePacker) -> None:
        self.store = store
        self.sources: Sequence[ByteSource] = (store.source,)
        self.most_bytes = max(piece.num_bytes for piece in plan.pieces)
        self._packer = packer
        self._pieces: dict[tuple[int, int], list[Piece]] = defaultdict(list)
        layers = {layer: number for number, layer in enumerate(sorted({one.bundle.layer for one in plan.pieces}))}
        begins: dict[tuple[int, int, int], int] = {}  # of layer, expert and part: bytes into the slot
        ends: dict[tuple[int, int], int] = defaultdict(int)
        for index, piece in enumerate(plan.pieces):
            owner = layers[piece.bundle.layer], piece.bundle.expert or 0
            begin = begins.setdefault((*owner, piece.bundle.part), ends[owner])
            ends[owner] = begin + piece.bundle.num_bytes
            self._pieces[owner].append(self._piece(index, piece, begin + piece.start))

    def pieces(self, layer: int, expert: int) -> Sequence[Piece]:
        """See `Bundles`."""
        return self._pieces[layer, expert]

    def close(self) -> None:
        """Closes the store; may be called twice."""
        self.store.close()

    def _piece(self, index: int, piece: StoredPiece, begin: int) -> Piece:
        """`begin`: bytes into the slot."""
        offset, num_bytes, _ = self.store.place(index)

        def unpack(data: NDArray[np.uint8], slot: NDArray[np.uint8]) -> None:
            out = slot[begin : begin + num_bytes]
            if self.store.check(index, data):
                out[:] = data
            else:
                self._repair(index, piece, out)

        return Piece(piece.bundle.part, Extent(0, offset, num_bytes), unpack)

    def _repair(self, index: int, piece: StoredPiece, out: NDArray[np.uint8]) -> None:
        """Fills `out` with what could not be read rightly."""
        try:
            self.store.read_into(index, out)
        except FlashError as error:
            log.warning("%s: packed from the model instead; `strata verify` tells more", error)
            out[:] = piece.of(self._packer.pack(piece.bundle, self._packer.read(piece.bundle)))


def stored_bundles(
    gguf: GGUFFile, model: Model, isa: ISA, root: Path, tuning: Tuning | None = None
) -> StoredBundles | None:
    """The model's store among those in `root`, if it is there and can be used; if it cannot, a warning says why."""
    if not root.is_dir():
        return None
    plan = plan_store(gguf, model, root, isa=isa, tuning=tuning)
    if not plan.folder.is_dir():
        return None
    try:
        store = Store.open(plan.folder, plan.key)
    except (FlashError, ModelFormatError) as error:
        log.warning("%s; reading from the model file", error)
        return None
    return StoredBundles(store, plan, BundlePacker(gguf, isa))
