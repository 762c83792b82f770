"""Reads KV blocks from their files, several at a time past the page cache, each checked before anybody sees its rows.

A block whose bytes are wrong is read again, and refused with the reason if it stays wrong. Knows nothing about what the
rows mean.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from offload.errors import FlashError, StrataError
from offload.flash import DEADLINE_S, Extent, FlashReader, ReadMode
from offload.gguf_source import ByteSource
from offload.kv_session_block import HEADER_BYTES, BlockSize, Fault, Refusal, fault

AT_ONCE = 64  # files that are open together

Consume = Callable[[int, NDArray[np.uint8]], None]
"""(index of the block, its rows, which are only valid during the call); called on several threads at once."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The block with this index cannot be used."""

    index: int
    path: Path
    fault: Fault


def read_blocks(
    blocks: Sequence[tuple[Path, bytes]],
    size: BlockSize,
    consume: Consume,
    *,
    at_once: int | None = None,
    deadline_s: float = DEADLINE_S,
) -> Refused | None:
    """Reads blocks, (path, digest), and hands the rows of each to `consume`; None if all were right.

    Otherwise the first that was not; blocks behind it may or may not have been handed over. `at_once`: so many in any
    order, before others; None: as many as go.
    """
    mode = ReadMode.DIRECT
    together = min(at_once or AT_ONCE, AT_ONCE)
    for first in range(0, len(blocks), together):
        batch = _Batch(blocks[first : first + together], size, consume, first, mode)
        refused = batch.read(deadline_s)
        mode = batch.mode
        if refused is not None:
            return refused
    return None


class _Batch:
    """Blocks that are read together; `first`: the index of the first of them. `mode` is what the drive can."""

    def __init__(
        self, blocks: Sequence[tuple[Path, bytes]], size: BlockSize, consume: Consume, first: int, mode: ReadMode
    ) -> None:
        self.mode = mode
        self._blocks, self._size, self._consume, self._first = blocks, size, consume, first
        self._sources: list[ByteSource] = []
        self._faults: dict[int, Fault] = {}

    def read(self, deadline_s: float) -> Refused | None:
        """See `read_blocks`."""
        try:
            self._open()
            if self._sources:
                self._read_sources(deadline_s)
        finally:
            for source in self._sources:
                source.close()
        if not self._faults:
            return None
        index = min(self._faults)
        return Refused(self._first + index, self._blocks[index][0], self._faults[index])

    def _open(self) -> None:
        """The files up to the first that cannot be used."""
        for index, (path, _) in enumerate(self._blocks):
            try:
                source = ByteSource(path)
            except StrataError as error:
                self._faults[index] = Fault(Refusal.UNREADABLE, str(error))
                return
            self._sources.append(source)
            if source.size != self._size.file_bytes:
                size = f"it has {source.size} bytes, not {self._size.file_bytes}"
                self._faults[index] = Fault(Refusal.DAMAGED, size)
                self._sources.pop().close()
                return

    def _read_sources(self, deadline_s: float) -> None:
        try:
            reader = FlashReader(self._sources, most_bytes=self._size.file_bytes, mode=self.mode, deadline_s=deadline_s)
        except FlashError as error:
            self._faults[0] = Fault(Refusal.UNREADABLE, str(error))
            return
        self.mode = reader.mode
        with reader:
            for index in range(len(self._sources)):
                self._ask(reader, index)
            reader.drain()

    def _ask(self, reader: FlashReader, index: int) -> None:
        def take(data: NDArray[np.uint8]) -> None:
            if (found := self._fault(index, data)) is None:
                self._consume(self._first + index, data[HEADER_BYTES : HEADER_BYTES + self._size.num_bytes])
            else:
                self._faults[index] = found

        def failed(error: StrataError) -> None:
            self._faults[index] = Fault(Refusal.UNREADABLE, str(error))

        reader.submit(Extent(index, 0, self._size.file_bytes), take, failed)

    def _fault(self, index: int, data: NDArray[np.uint8]) -> Fault | None:
        """What is wrong with a block also when it is read again, which brings it to `data`."""
        digest = self._blocks[index][1]
        if fault(data, digest, self._size) is None:
            return None
        again = np.empty_like(data)
        self._sources[index].read_into(again.data, 0)
        found = fault(again, digest, self._size)
        if found is None:
            data[:] = again
        return found
