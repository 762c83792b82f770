"""Which chunks of an executor's sequences lie in RAM and which on flash alone, within a limit for RAM.

A *piece* of a sequence goes to flash in a group of layers at once (`kv_groups`); the oldest piece goes first, of the
sequence that has the most in RAM. Pieces that will go next are written ahead. Knows nothing about how a pass reads what
is on flash, but how much memory that takes. Invariant: chunks and that memory together stay within the limit.
"""

import logging
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.kv_layout import PIECE_TOKENS
from offload.closing import Closing
from offload.errors import FlashError, SequenceError
from offload.kv_chunks import Chunk, ChunkStore, cached_chunks, staging_slots
from runtime.executor.program.kv_groups import LayerGroup, in_order

if TYPE_CHECKING:
    from runtime.executor.program.kv import ProgramKV
    from runtime.executor.program.sequence_layout import SequenceLayout

log = logging.getLogger("strata.kv")

AHEAD_PIECES = 2  # that are written to flash before there is need


class KVTiers(Closing):
    """Chunks of sequences in `store`; those in RAM take at most `most_bytes`, None for no limit.

    `windows`: of the newest tokens that each layer sees, None for all; none given: all layers see all.
    """

    def __init__(
        self, store: ChunkStore | None = None, most_bytes: int | None = None, windows: Sequence[int | None] = ()
    ) -> None:
        self.store = store or ChunkStore()
        self.most_bytes = most_bytes
        self.windows = tuple(windows)
        self._sequences: weakref.WeakSet[ProgramKV] = weakref.WeakSet()
        self._told = False

    @property
    def spills(self) -> bool:
        """Whether chunks may lie on flash."""
        return self.most_bytes is not None and self.store.spill is not None

    def add(self, kv: "ProgramKV") -> None:
        """A sequence whose chunks are in the store."""
        if self.most_bytes is not None:
            self._sequences.add(kv)

    @property
    def cold_pieces(self) -> int:
        """Pieces that lie on flash alone in the layers that have most there, of all sequences."""
        return sum(max(_cold(kv)) for kv in self._sequences)

    @property
    def staging_slots(self) -> int:
        """Chunks that there may be room for to read those on flash to."""
        whole = part = 0
        for kv in self._sequences:
            counts = list(zip(kv.groups, _cold(kv), strict=True))
            whole += max((count for group, count in counts if not group.is_chosen), default=0)
            part += max((count for group, count in counts if group.is_chosen), default=0)
        layout = self._layout
        return 0 if layout is None else staging_slots(len(layout.layers), chunk_bytes(layout), whole, part)

    @property
    def taken_bytes(self) -> int:
        """Bytes of RAM of all that is kept."""
        return self._held_bytes + self.cache_bytes

    @property
    def cache_bytes(self) -> int:
        """Bytes of RAM for what tokens choose most of chunks on flash: as much as it should have, if there is room."""
        left = self._cached_bytes if self.most_bytes is None else self.most_bytes - self._held_bytes
        return max(min(self._cached_bytes, left), 0)

    @property
    def _held_bytes(self) -> int:
        """Of chunks, of the abstracts that are chosen by, and of what those on flash are read to."""
        held = self.store.ram_bytes + sum(index_bytes(kv.layout, kv.pieces + 1) for kv in self._sequences)
        return held if self._layout is None else held + self.staging_slots * chunk_bytes(self._layout)

    @property
    def _cached_bytes(self) -> int:
        """That the cache of what is chosen should have. A new piece, which will be filled, changes nothing."""
        return sum(
            cached_chunks(cold, kv.settled_pieces(layer) + 1 - cold) * kv.layout.layers[layer].chunk_bytes
            for kv in self._sequences
            for group, cold in zip(kv.groups, _cold(kv), strict=True)
            for layer in group.layers
            if group.is_chosen
        )

    @property
    def _layout(self) -> "SequenceLayout | None":
        """Of a sequence; those of others differ in their capacity alone."""
        return next((kv.layout for kv in self._sequences), None)

    def make_room(self, kv: "ProgramKV", num_bytes: int) -> None:
        """Moves pieces to flash until RAM has room for so many bytes of `kv`; SequenceError where it has not."""
        if self.most_bytes is None:
            return
        while self._held_bytes + self._cached_bytes + num_bytes > self.most_bytes:
            lacking = (
                f"{num_bytes} bytes of keys and values have no room in the {self.most_bytes} bytes of RAM that "
                "they may take"
            )
            self._send_one(kv, lacking)

    def new(self, kv: "ProgramKV", num_bytes: int) -> Chunk:
        """A new chunk of `kv`, for which others go to flash where need be; SequenceError where there is no room."""
        while True:
            self.make_room(kv, num_bytes)
            try:
                return self.store.new(num_bytes)
            except MemoryError as error:
                self.give_way(kv, error)

    def give_way(self, kv: "ProgramKV", error: MemoryError) -> None:
        """The system has no memory for what `kv` needs next: a piece goes to flash; SequenceError where none can."""
        log.warning("KV: there is no memory for %s", str(error))  # not the error, whose frames hold `kv`
        self._send_one(kv, f"there is no memory for {error} of keys and values")

    def write_ahead(self) -> None:
        """Has those pieces written that will go to flash next, once RAM is nearly full."""
        if not self.spills or not self.store.can_save:
            return
        assert self.most_bytes is not None, "asked by `spills`"
        chunks = 0
        for kv, piece, group in self._next_to_go():
            nearly = self._held_bytes + self._cached_bytes + 2 * AHEAD_PIECES * kv.layout.piece_bytes
            if chunks >= AHEAD_PIECES * len(kv.layout.layers) or nearly < self.most_bytes:
                return
            kv.save(piece, group.layers)
            chunks += len(group.layers)

    def read(self, kv: "ProgramKV", piece: int, chunk: Chunk) -> NDArray[np.uint8]:
        """See `ChunkStore`; SequenceError where it cannot be read, or not for want of memory."""
        while True:
            try:
                return self.store.read(chunk)
            except FlashError as error:
                raise lost(kv, piece, error) from error
            except MemoryError as error:
                self.give_way(kv, error)

    def writable(self, kv: "ProgramKV", piece: int, chunk: Chunk) -> Chunk:
        """See `ChunkStore`; SequenceError where it cannot be read."""
        try:
            return self.store.writable(chunk)
        except FlashError as error:
            raise lost(kv, piece, error) from error

    def close(self) -> None:
        """Gives back what is on flash."""
        self.store.close()

    def _next_to_go(self) -> Iterator[tuple["ProgramKV", int, LayerGroup]]:
        """Settled pieces in RAM in the order in which they go, and of which layers."""
        queues, left = {}, {}
        for kv in self._sequences:
            cold, full = _cold(kv), [kv.settled_pieces(group.layers[0]) for group in kv.groups]
            queues[kv] = in_order(kv.groups, cold, full, kv.settled_tokens)
            counts = zip(kv.groups, cold, full, strict=True)
            left[kv] = sum(max(there - count, 0) * len(group.layers) for group, count, there in counts)
        while left and left[kv := max(left, key=lambda kv: left[kv])] > 0:
            piece, group = next(queues[kv])
            yield kv, piece, group
            left[kv] -= len(group.layers)

    def _send_one(self, kv: "ProgramKV", lacking: str) -> None:
        """Moves a piece to flash; SequenceError where none can be, for what `kv` is lacking."""
        victim = next(self._next_to_go(), None)
        try:
            if victim is None:
                raise FlashError("nothing is left that could go there")
            self._tell(*victim)
            victim[0].evict(victim[1], victim[2].layers)
        except FlashError as error:
            raise SequenceError(
                f"{lacking}, and not on flash: {error}",
                kv=kv,
                kept_tokens=kv.length,
                hint="raise --kv-ram, or run with a shorter context or a smaller KV type",
            ) from error

    def _tell(self, kv: "ProgramKV", piece: int, group: LayerGroup) -> None:
        tell = log.debug if self._told else log.info
        self._told = True
        first, last = piece * PIECE_TOKENS, (piece + 1) * PIECE_TOKENS - 1
        tell("KV: RAM is full; tokens %d to %d of %d layers go to flash", first, last, len(group.layers))


def lost(kv: "ProgramKV", piece: int, error: FlashError) -> SequenceError:
    """What lay on flash of a piece cannot be read."""
    tokens = min(kv.length, piece * PIECE_TOKENS)
    return SequenceError(
        f"keys and values from token {tokens} on were lost: {error}", kv=kv, kept_tokens=tokens, hint=error.hint
    )


def no_memory(kv: "ProgramKV", error: MemoryError) -> SequenceError:
    """What lies on flash cannot be read, for want of memory."""
    return SequenceError(
        f"there is no memory for {error} of keys and values that lie on flash",
        kv=kv,
        kept_tokens=kv.length,
        hint="run with a shorter context or a smaller KV type",
    )


def chunk_bytes(layout: "SequenceLayout") -> int:
    """Bytes of the largest chunk."""
    return max(kept.chunk_bytes for kept in layout.layers)


def index_bytes(layout: "SequenceLayout", pieces: int) -> int:
    """Bytes of the abstracts of so many pieces."""
    return 0 if layout.abstracts is None else layout.abstracts.num_bytes * pieces // layout.layers[0].pieces


def _cold(kv: "ProgramKV") -> list[int]:
    """Of each group of layers the pieces that lie on flash alone, the first ones."""
    counts = []
    for group in kv.groups:
        chunks = kv.chunks(group.layers[0])
        counts.append(next((at for at, chunk in enumerate(chunks) if chunk.memory is not None), len(chunks)))
    return counts
