"""The weights of a model in panels: every matrix packed once for this machine's kernels, vectors as float32.

Matrices lie in one piece of memory, those that are multiplied with the same activations side by side (`joined`), so
that one product serves them all; some may be left to `StreamedWeights`. Knows nothing about programs.
Invariants: while loading, no more than three units (`UNIT_BYTES`) of a file's bytes are in memory beside the panels;
one that holds NaN or infinity is never handed out.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.formats import chosen_format, has_panel_format
from cpu_kernels.isa import ISA
from cpu_kernels.isa import current as current_isa
from cpu_kernels.pack import pack
from cpu_kernels.panel_rows import PanelRows
from cpu_kernels.reference.dequantize import dequantizable, dequantize
from cpu_kernels.tuning import Tuning
from offload.errors import UnsupportedModelError
from offload.gguf import GGUFFile, TensorInfo
from offload.memory import reserved_bytes
from runtime.architectures.base import Model
from runtime.bundles import is_vector, layer_bundles
from runtime.finite import FiniteCheck
from runtime.panel import Panel
from runtime.streamed import StreamedWeights

UNIT_BYTES = 16 << 20
GROUPS_A_UNIT = 16  # a unit is a multiple: then it begins on a cache line whatever a group's bytes are

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class _Unit:
    """Rows of a matrix or of an expert's that are read and packed at once."""

    tensor: TensorInfo
    expert: int
    first_row: int
    rows: int


class PanelWeights:
    """The weights of `model`, read from `gguf`, which must stay open until `load` has returned."""

    def __init__(
        self,
        gguf: GGUFFile,
        model: Model,
        *,
        isa: ISA | None = None,
        threads: int = 1,
        streamed: StreamedWeights | None = None,
        tuning: Tuning | None = None,
        elsewhere: frozenset[str] = frozenset(),
    ) -> None:
        """`streamed`: the weights that are not to be loaded, which belong to this from now on.

        `elsewhere`: names of matrices that are not multiplied with here, and so not loaded.

        `tuning`: which kernels are to multiply them, for the same ISA; the usual ones for None.

        UnsupportedModelError naming a tensor whose type has no kernel.
        """
        self.isa = isa or current_isa()
        self.streamed = streamed
        self._gguf = gguf
        self._model = model
        self._threads = threads
        self._tuning = tuning
        self._left_out = elsewhere if streamed is None else elsewhere | streamed.tensors
        self._bundles = [bundle for bundle in _bundles(model) if bundle[0].name not in self._left_out]
        self._vector_tensors = [tensor for name, tensor in model.tensors() if is_vector(name)]
        self._panels: dict[str, Panel] = {}
        self._vectors: dict[str, NDArray[np.float32]] = {}
        self._arena = np.empty(0, np.uint8)
        self._rows: PanelRows | None = None
        self._embedding: NDArray[np.uint8] | None = None  # (vocab, row bytes), unless the output's panels hold it
        self._finite = FiniteCheck(gguf.path)
        self._check_types()

    @property
    def num_bytes(self) -> int:
        """Bytes held in RAM."""
        embedding = 0 if self._embedding is None else self._embedding.nbytes
        streamed = 0 if self.streamed is None else self.streamed.cache.num_bytes
        return self._arena.nbytes + embedding + streamed + sum(vector.nbytes for vector in self._vectors.values())

    def panel(self, tensor: TensorInfo) -> Panel:
        """A matrix; KeyError for a tensor that is none."""
        panel = self._panels.get(tensor.name)
        return self.streamed.panel(tensor) if panel is None and self.streamed is not None else self._panels[tensor.name]

    def close(self) -> None:
        """Ends the reads of streamed weights; may be called twice."""
        if self.streamed is not None:
            self.streamed.close()

    def vector(self, tensor: TensorInfo) -> NDArray[np.float32]:
        """A norm's weights, a bias, a factor or a table of divisors; it stays where it is in memory."""
        return self._vectors[tensor.name]

    def embeddings(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """The rows of `token_embd`: (len(ids), embedding length)."""
        if self._rows is not None:
            return self._rows.read(ids)
        assert self._embedding is not None, "load was called"
        tensor = self._model.token_embd
        rows = dequantize(self._embedding[np.asarray(ids)], tensor.quant_type)
        self._finite.values(tensor, rows)
        return rows

    def load(self, progress: Progress | None = None) -> None:
        """Reads and packs every tensor; `progress(done, total)` hears of the file's bytes that are done.

        FlashError if reading fails; ModelFormatError naming a tensor that holds NaN or infinity.
        """
        embedding = self._model.token_embd.name
        total = sum(
            tensor.num_bytes
            for _, tensor in self._model.tensors()
            if tensor.name not in self._left_out or tensor.name == embedding
        )
        done = 0
        for num_bytes in self._load():
            done += num_bytes
            if progress is not None:
                progress(done, total)
        if self.streamed is not None:  # RAM is short: full of pages that nobody reads, all allocations wait for some
            for source in self._gguf.sources:
                source.forget()

    def _load(self) -> Iterator[int]:
        """Loads all, yielding the bytes of the file that each part took."""
        self._place()
        for tensor in self._vector_tensors:
            vector = dequantize(self._gguf.read(tensor).reshape(1, -1), tensor.quant_type).reshape(-1)
            self._finite.values(tensor, vector)
            self._vectors[tensor.name] = np.ascontiguousarray(vector)
            yield tensor.num_bytes
        for unit, data in self._read_ahead():
            self._pack(unit, data)
            yield data.nbytes
        model = self._model
        output = self._panels.get(model.output.name)
        if model.is_tied and output is not None:
            self._rows = PanelRows(output.form, output.address, output.rows, output.columns)
            return
        rows = model.token_embd.shape[0]
        self._embedding = self._gguf.read(model.token_embd).reshape(rows, -1)
        yield model.token_embd.num_bytes

    def _place(self) -> None:
        """Gives every matrix its place and takes the memory."""
        places: list[tuple[TensorInfo, Panel]] = []
        offset = 0
        for bundle in self._bundles:
            sizes = [_sizes(tensor) for tensor in bundle]
            forms = [chosen_format(tensor.quant_type, self.isa, self._tuning) for tensor in bundle]
            num_bytes = [form.panel_bytes(rows, columns) for form, (_, rows, columns) in zip(forms, sizes, strict=True)]
            start = offset
            for tensor, form, (experts, rows, columns), size in zip(bundle, forms, sizes, num_bytes, strict=True):
                places.append((tensor, Panel(form, start, rows, columns, experts, sum(num_bytes))))
                start += size
            offset += sizes[0][0] * sum(num_bytes)
        self._arena = reserved_bytes(offset, huge_pages=True)
        base = self._arena.ctypes.data
        self._panels = {tensor.name: replace(panel, address=base + panel.address) for tensor, panel in places}

    def _read_ahead(self) -> Iterator[tuple["_Unit", NDArray[np.uint8]]]:
        """Every unit with its bytes; the next one is read while one is packed."""
        with ThreadPoolExecutor(1, "strata-reader") as reader:
            previous: tuple[_Unit, Future[NDArray[np.uint8]]] | None = None
            for unit in self._units():
                reading = reader.submit(self._read, unit)
                if previous is not None:
                    yield previous[0], previous[1].result()
                previous = unit, reading
            if previous is not None:
                yield previous[0], previous[1].result()

    def _units(self) -> Iterator["_Unit"]:
        """Runs of rows of all matrices, in the order of their places."""
        for bundle in self._bundles:
            for tensor in bundle:
                panel = self._panels[tensor.name]
                group_bytes = tensor.quant_type.row_bytes(panel.columns) * panel.form.group_rows
                groups = max(1, UNIT_BYTES // (group_bytes * GROUPS_A_UNIT)) * GROUPS_A_UNIT
                step = groups * panel.form.group_rows
                for expert in range(panel.experts):
                    for first in range(0, panel.rows, step):
                        yield _Unit(tensor, expert, first, min(step, panel.rows - first))

    def _read(self, unit: "_Unit") -> NDArray[np.uint8]:
        """(rows, bytes of a row)."""
        panel = self._panels[unit.tensor.name]
        data = np.empty((unit.rows, unit.tensor.quant_type.row_bytes(panel.columns)), np.uint8)
        start = (unit.expert * panel.rows + unit.first_row) * data.shape[1]
        self._gguf.read_into(unit.tensor, data.reshape(-1), start=start)
        return data

    def _pack(self, unit: "_Unit", data: NDArray[np.uint8]) -> None:
        panel = self._panels[unit.tensor.name]
        offset = panel.address - self._arena.ctypes.data + unit.expert * panel.expert_bytes
        offset += unit.first_row // panel.form.group_rows * panel.form.group_bytes(panel.columns)
        out = self._arena[offset : offset + panel.form.panel_bytes(unit.rows, panel.columns)]
        place = (unit.rows, panel.columns, self.isa, out, self._threads)
        pack(data.reshape(-1), unit.tensor.quant_type, *place, panel.form.family)
        self._finite.panel(unit.tensor, panel.form, panel.columns, out.ctypes.data, data)

    def _check_types(self) -> None:
        for bundle in self._bundles:
            for tensor in bundle:
                if not has_panel_format(tensor.quant_type):
                    raise self._unsupported(tensor)
        for tensor in (*self._vector_tensors, self._model.token_embd):
            if not dequantizable(tensor.quant_type):
                raise self._unsupported(tensor)

    def _unsupported(self, tensor: TensorInfo) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self._gguf.path}: there is no kernel for tensor {tensor.name} of type {tensor.quant_type.name}",
            hint="run it with --loop sequential or --engine llama.cpp",
        )


def _bundles(model: Model) -> Iterator[tuple[TensorInfo, ...]]:
    """The matrices in the order a step reads them, those of one bundle together."""
    for layer in model.layers:
        for names in layer_bundles(layer):
            yield tuple(getattr(layer, name) for name in names)
    yield (model.output,)


def _sizes(tensor: TensorInfo) -> tuple[int, int, int]:
    """(experts, rows, columns) of a matrix, or of a vector that is multiplied as one row."""
    experts, rows, columns = (1, 1, 1, *tensor.shape)[-3:]
    return experts, rows, columns
