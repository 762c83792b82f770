"""Weights that do not all fit in RAM: they come from flash when a step needs them, into slots that they share.

A slot holds an expert of a layer, or the matrices of a layer of a dense model: bundle after bundle, laid out as
`PanelWeights` lays them out, so that the same products serve both. Here are the places in slots and the reads from the
GGUF file, which are packed as they land. Knows nothing about programs or about which weights are kept.
Invariant: what is read from the GGUF is looked at for numbers that are not finite when it is first read.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.expert_slots import ExpertSlots
from cpu_kernels.isa import ISA
from cpu_kernels.pack import pack
from cpu_kernels.tuning import Tuning
from offload.closing import Closing
from offload.expert_cache import Elsewhere, ExpertCache
from offload.expert_load import Bundles, Piece
from offload.flash import DEADLINE_S, DEPTH, READ_BYTES, Extent, FlashReader, ReadMode
from offload.gguf import GGUFFile, TensorInfo
from offload.gguf_source import ByteSource
from offload.policies import PolicyName
from offload.prefetch_gate import PrefetchMode
from runtime.architectures.base import Model
from runtime.finite import FiniteCheck
from runtime.packing import ModelBundle, PackedMatrix, model_bundles
from runtime.panel import Panel, SlotPart

PAGE_BYTES = 4096
GROUPS_A_READ = 16  # a run of rows is a multiple: then its panels begin on a cache line whatever a group's bytes are


class BundleSource(Bundles, Protocol):
    """`Bundles`, with what their reads need: the files, and the longest read."""

    sources: Sequence[ByteSource]
    most_bytes: int

    def close(self) -> None:
        """Closes what was opened for it; may be called twice."""
        ...


class GGUFBundles:
    """Bundles of an open GGUF file, read in runs of rows and packed into their slots."""

    def __init__(self, gguf: GGUFFile, model: Model, isa: ISA, tuning: Tuning | None = None) -> None:
        self.sources: Sequence[ByteSource] = gguf.sources
        finite = FiniteCheck(gguf.path)
        self._pieces: dict[tuple[int, int], list[Piece]] = defaultdict(list)
        for number, bundle, offset in _placed(model, isa, tuning):
            runs = _runs(bundle, offset)
            self._pieces[number, bundle.expert or 0] += [_Packing(run, isa, finite).piece() for run in runs]
        self.most_bytes = max(piece.extent.num_bytes for pieces in self._pieces.values() for piece in pieces)

    def pieces(self, layer: int, expert: int) -> Sequence[Piece]:
        """See `Bundles`."""
        return self._pieces[layer, expert]

    def close(self) -> None:
        """Nothing: the file is its owner's."""


class _Packing:
    """Packs what was read of a run into its slot, and looks at it when it is read for the first time."""

    __slots__ = ("_finite", "_is_seen", "_isa", "_run")

    def __init__(self, run: "_Run", isa: ISA, finite: FiniteCheck) -> None:
        self._run = run
        self._isa = isa
        self._finite = finite
        self._is_seen = False

    def piece(self) -> Piece:
        """The read, with this as what becomes of it."""
        run, tensor = self._run, self._run.matrix.tensor
        start = (run.expert * run.matrix.rows + run.first) * run.matrix.row_bytes
        return Piece(run.part, Extent(tensor.shard, tensor.offset + start, run.num_bytes), self)

    def __call__(self, data: NDArray[np.uint8], slot: NDArray[np.uint8]) -> None:
        run, matrix, form = self._run, self._run.matrix, self._run.matrix.form
        begin = run.offset + run.first // form.group_rows * form.group_bytes(matrix.columns)
        out = slot[begin : begin + form.panel_bytes(run.rows, matrix.columns)]
        pack(data, matrix.tensor.quant_type, run.rows, matrix.columns, self._isa, out, family=form.family)
        if not self._is_seen:
            rows = data.reshape(run.rows, matrix.row_bytes)
            self._finite.panel(matrix.tensor, form, matrix.columns, out.ctypes.data, rows)
            self._is_seen = True


class StreamedWeights(Closing):
    """The streamed weights of `model` in `slots` slots of RAM, brought by `source`, which belongs to this from now on.

    Those are its routed experts, or the matrices of its layers if it has none.
    """

    def __init__(
        self,
        source: BundleSource,
        model: Model,
        isa: ISA,
        *,
        slots: int,
        policy: PolicyName = PolicyName.LEAST_STALE,
        prefetch: PrefetchMode = PrefetchMode.AUTO,
        mode: ReadMode = ReadMode.DIRECT,
        depth: int = DEPTH,
        deadline_s: float = DEADLINE_S,
        tuning: Tuning | None = None,
    ) -> None:
        """`tuning`: as that of `source`."""
        self._source = source
        placed = list(_placed(model, isa, tuning))
        layers = 1 + max(number for number, _, _ in placed)
        experts = model.experts.count if model.experts is not None else 1
        parts = 1 + max(bundle.part for _, bundle, _ in placed)
        sizes: dict[tuple[int, int], int] = defaultdict(int)
        for number, bundle, _ in placed:
            sizes[number, bundle.expert or 0] += bundle.num_bytes
        slot_bytes = -(-max(sizes.values()) // PAGE_BYTES) * PAGE_BYTES
        self.slots = ExpertSlots(layers, experts, parts, slots=min(slots, layers * experts), slot_bytes=slot_bytes)
        reader = FlashReader(
            source.sources, most_bytes=source.most_bytes, mode=mode, depth=depth, deadline_s=deadline_s
        )
        self.cache = ExpertCache(self.slots, source, reader, policy=policy, prefetch=prefetch)
        self._layer_numbers = {bundle.layer: number for number, bundle, _ in placed}
        self._panels = {
            matrix.tensor.name: Panel(
                *(matrix.form, self.cache.address + offset + matrix.offset, matrix.rows, matrix.columns, experts),
                place=SlotPart(self.slots, number, bundle.part),
            )
            for number, bundle, offset in placed
            for matrix in bundle.matrices
            if not bundle.expert
        }

    @property
    def tensors(self) -> frozenset[str]:
        """Names of the tensors that are streamed."""
        return frozenset(self._panels)

    def panel(self, tensor: TensorInfo) -> Panel:
        """A matrix, or the stacked ones of all experts, placed in the first slot; KeyError for another tensor."""
        return self._panels[tensor.name]

    def layer_number(self, layer: int) -> int:
        """A layer's number in the tables; KeyError for one without streamed weights."""
        return self._layer_numbers[layer]

    def has_slot(self, layer: int) -> NDArray[np.bool_]:
        """(experts,) those of a layer that have a slot; KeyError for a layer without streamed weights."""
        return self.slots.has_slot(self._layer_numbers[layer])

    def leave_out(self, elsewhere: Elsewhere) -> None:
        """Does not read ahead what `elsewhere` tells of a layer of the model: another device has it."""
        layers = {number: layer for layer, number in self._layer_numbers.items()}
        self.cache.leave_out(lambda number: elsewhere(layers[number]))

    def close(self) -> None:
        """Ends the reads; may be called twice."""
        self.cache.close()
        self._source.close()


@dataclass(frozen=True, slots=True)
class _Run:
    """Rows of a matrix that one read brings; the matrix's panels begin `offset` bytes into the slot."""

    matrix: PackedMatrix
    expert: int
    part: int
    offset: int
    first: int
    rows: int

    @property
    def num_bytes(self) -> int:
        """Of the read."""
        return self.rows * self.matrix.row_bytes


def _placed(model: Model, isa: ISA, tuning: Tuning | None) -> Iterator[tuple[int, ModelBundle, int]]:
    """(number of the layer among those with bundles, bundle, bytes into the slot) of every bundle."""
    bundles = model_bundles(model, isa, tuning)
    numbers = {layer: number for number, layer in enumerate(dict.fromkeys(bundle.layer for bundle in bundles))}
    ends: dict[tuple[int, int], int] = defaultdict(int)
    for bundle in bundles:
        owner = bundle.layer, bundle.expert or 0
        yield numbers[bundle.layer], bundle, ends[owner]
        ends[owner] += bundle.num_bytes


def _runs(bundle: ModelBundle, offset: int) -> Iterator[_Run]:
    """The reads that bring a bundle."""
    for matrix in bundle.matrices:
        group_bytes = matrix.row_bytes * matrix.form.group_rows
        step = max(1, READ_BYTES // (group_bytes * GROUPS_A_READ)) * GROUPS_A_READ * matrix.form.group_rows
        for first in range(0, matrix.rows, step):
            rows = min(step, matrix.rows - first)
            yield _Run(matrix, bundle.expert or 0, bundle.part, offset + matrix.offset, first, rows)
