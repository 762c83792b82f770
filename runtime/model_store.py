"""The store of a model: its key and place, and how it is built from the GGUF: reading, packing and writing at once.

A store has every bundle of the model cut into pieces that one read brings. Knows nothing about commands, nor how a
store is used. One thread reads ahead, some pack, some write behind.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.isa import ISA
from cpu_kernels.isa import current as current_isa
from cpu_kernels.tuning import Tuning
from offload.flash import READ_BYTES
from offload.gguf import GGUFFile
from offload.store_files import FILES, Files
from offload.store_folder import store_folder
from offload.store_key import StoreKey, store_key
from offload.store_manifest import Manifest
from offload.store_writer import StoreWriter
from runtime.architectures.base import Model
from runtime.packing import BundlePacker, ModelBundle, layout_name, model_bundles

AHEAD_BYTES = 64 << 20  # of the GGUF that are read, and not yet written

PIECE_BYTES = READ_BYTES
WRITERS = 2  # one prepares a write while the other's is under way: 2.5 GB/s against 1.8 (2 cores, source in RAM)

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class StoredPiece:
    """Bytes `start` to `start + num_bytes` of a bundle of the model: what the store has as a bundle of its own."""

    bundle: ModelBundle
    start: int
    num_bytes: int

    @property
    def name(self) -> str:
        """The bundle's, and where it begins unless it is the first."""
        return f"{self.bundle.name}@{self.start}" if self.start else self.bundle.name

    def of(self, packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The piece of the packed bundle."""
        return packed[self.start : self.start + self.num_bytes]


@dataclass(frozen=True, slots=True)
class StorePlan:
    """The store that a model has, or would have; `pieces` in the order in which the store has them."""

    folder: Path
    key: StoreKey
    pieces: tuple[StoredPiece, ...]

    @property
    def num_bytes(self) -> int:
        """Of all pieces."""
        return sum(piece.num_bytes for piece in self.pieces)


def plan_store(
    gguf: GGUFFile, model: Model, root: Path, *, isa: ISA | None = None, tuning: Tuning | None = None
) -> StorePlan:
    """The store of an open model among those in `root`, packed for the kernels that `tuning` chooses.

    UnsupportedModelError if its types have no kernels, FlashError if its headers cannot be read.
    """
    isa = isa or current_isa()
    bundles = model_bundles(model, isa, tuning)
    key = store_key(gguf, layout_name(bundles, isa))
    pieces = tuple(
        StoredPiece(bundle, start, min(PIECE_BYTES, bundle.num_bytes - start))
        for bundle in bundles
        for start in range(0, bundle.num_bytes, PIECE_BYTES)
    )
    return StorePlan(store_folder(root, key), key, pieces)


def build_store(
    gguf: GGUFFile,
    plan: StorePlan,
    *,
    isa: ISA | None = None,
    threads: int = 1,
    progress: Progress | None = None,
    files: Files = FILES,
) -> Manifest:
    """Makes the store, or goes on making it where an earlier run ended; `progress(done, total)` hears of its bytes.

    FlashError if reading or writing fails or space is lacking, ModelFormatError naming a tensor that holds NaN or
    infinity: then what is done is kept.
    """
    packer = BundlePacker(gguf, isa or current_isa())
    sizes = [(piece.name, piece.num_bytes) for piece in plan.pieces]
    with StoreWriter(plan.folder, plan.key, sizes, files=files) as writer:
        done_before = writer.done
        done = sum(plan.pieces[index].num_bytes for index in done_before)
        left = [index for index in range(len(plan.pieces)) if index not in done_before]
        with closing(_written(packer, plan.pieces, left, writer, threads)) as written:
            for index in written:
                done += plan.pieces[index].num_bytes
                if progress is not None:
                    progress(done, plan.num_bytes)
        return writer.finish()


def _written(
    packer: BundlePacker, pieces: Sequence[StoredPiece], left: Sequence[int], writer: StoreWriter, threads: int
) -> Generator[int, None, None]:
    """Packs and writes the pieces `left`, yielding the index of each that is written."""
    with ExitStack() as stack:
        # the pools are left in the opposite order; what did not begin by then is no longer wanted
        reader, packers, behind = (stack.enter_context(_pool(count)) for count in (1, threads, WRITERS))
        underway: deque[_Writing] = deque()
        for bundle, group in groupby(left, key=lambda index: pieces[index].bundle):
            indices = tuple(group)
            while underway and sum(one.bundle.source_bytes for one in underway) + bundle.source_bytes > AHEAD_BYTES:
                yield from _finished(underway)
            reading = reader.submit(packer.read, bundle)
            packing = packers.submit(_packed, packer, bundle, reading)
            writing = behind.submit(_write, writer, [(index, pieces[index]) for index in indices], packing)
            underway.append(_Writing(bundle, indices, writing))
        while underway:
            yield from _finished(underway)


@dataclass(frozen=True, slots=True)
class _Writing:
    """A bundle of the model on its way, with its pieces."""

    bundle: ModelBundle
    indices: tuple[int, ...]
    writing: Future[None]


@contextmanager
def _pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that are gone at the end of the block, without beginning what they have not begun by then."""
    pool = ThreadPoolExecutor(threads, "strata-pack")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(underway: deque[_Writing]) -> Iterator[int]:
    """Waits for the first."""
    first = underway.popleft()
    first.writing.result()
    yield from first.indices


def _packed(packer: BundlePacker, bundle: ModelBundle, reading: Future[list[NDArray[np.uint8]]]) -> NDArray[np.uint8]:
    return packer.pack(bundle, reading.result())


def _write(writer: StoreWriter, pieces: Sequence[tuple[int, StoredPiece]], packing: Future[NDArray[np.uint8]]) -> None:
    packed = packing.result()
    for index, piece in pieces:
        writer.write(index, piece.of(packed))
