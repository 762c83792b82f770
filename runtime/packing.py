"""The bundles of a model that streams from flash: which there are, how large, and the packing of each from the GGUF.

A mixture of experts has two bundles for every expert of every layer, those of `EXPERT_BUNDLES`, one behind the other:
the panels of its gate and up matrices side by side, then those of its down matrix. A dense model has one for all
matrices of a layer that see the same activations. Panels lie as `PanelWeights` lays them out. Knows nothing about
stores. Invariant: a bundle that holds NaN or infinity is never handed out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from cpu_kernels.formats import PanelFormat, chosen_format, has_panel_format
from cpu_kernels.isa import ISA
from cpu_kernels.memory import aligned_bytes
from cpu_kernels.pack import pack
from cpu_kernels.quant_types import QuantType
from cpu_kernels.tuning import Tuning
from offload.errors import UnsupportedModelError
from offload.gguf import GGUFFile, TensorInfo
from runtime.architectures.base import Layer, Model
from runtime.bundles import EXPERT_BUNDLES, layer_bundles
from runtime.finite import FiniteCheck

SAMPLE_STEPS = 2  # of a row of the matrix that tells one layout from another


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A matrix (rows, columns), or an expert's: its panels lie `offset` bytes into the bundle."""

    tensor: TensorInfo
    form: PanelFormat
    offset: int
    rows: int
    columns: int

    @property
    def num_bytes(self) -> int:
        """Of its panels."""
        return self.form.panel_bytes(self.rows, self.columns)

    @property
    def row_bytes(self) -> int:
        """Of a row as GGUF has it."""
        return self.tensor.quant_type.row_bytes(self.columns)


@dataclass(frozen=True, slots=True)
class ModelBundle:
    """Matrices of a layer, or of an expert of it, that are kept as one; `part` counts those of a layer or expert."""

    name: str
    layer: int
    expert: int | None
    part: int
    matrices: tuple[PackedMatrix, ...]

    @property
    def num_bytes(self) -> int:
        """Of the panels."""
        last = self.matrices[-1]
        return last.offset + last.num_bytes

    @property
    def source_bytes(self) -> int:
        """Of the same matrices in the GGUF."""
        return sum(matrix.rows * matrix.row_bytes for matrix in self.matrices)


def model_bundles(model: Model, isa: ISA, tuning: Tuning | None = None) -> tuple[ModelBundle, ...]:
    """All bundles in the order of layers, experts and parts, packed for the kernels that a tuning chooses.

    UnsupportedModelError naming a type without kernels.
    """
    bundles: list[ModelBundle] = []
    for layer in model.layers:
        if model.experts is None:
            bundles += _bundles(layer, list(layer_bundles(layer)), None, isa, tuning)
        elif layer.ffn_down_exps is not None:
            for expert in range(model.experts.count):
                bundles += _bundles(layer, EXPERT_BUNDLES, expert, isa, tuning)
    return tuple(bundles)


def layout_name(bundles: Sequence[ModelBundle], isa: ISA) -> str:
    """The ISA's name, and a checksum of what its packers make of a sample of each type.

    So bundles that were packed by other code or for other kernels, if those pack otherwise, are known by their name.
    """
    forms = {matrix.form.quant_type.name: matrix.form for bundle in bundles for matrix in bundle.matrices}
    state = xxhash.xxh3_64()
    for _, form in sorted(forms.items()):
        state.update(form.name.encode())
        state.update(_packed_sample(form.quant_type, form, isa).data)
    return f"{isa.name}-{state.intdigest():016x}"


class BundlePacker:
    """Reads and packs bundles of an open model; may be used from several threads at once."""

    def __init__(self, gguf: GGUFFile, isa: ISA) -> None:
        self._gguf = gguf
        self._isa = isa
        self._finite = FiniteCheck(gguf.path)

    def read(self, bundle: ModelBundle) -> list[NDArray[np.uint8]]:
        """The bytes of each matrix, (rows, bytes of a row); FlashError if reading fails."""
        result = []
        for matrix in bundle.matrices:
            data = np.empty((matrix.rows, matrix.row_bytes), np.uint8)
            self._gguf.read_into(matrix.tensor, data, start=(bundle.expert or 0) * data.nbytes)
            result.append(data)
        return result

    def pack(self, bundle: ModelBundle, data: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """The bundle, (its bytes,), from what `read` gave.

        ModelFormatError naming a tensor that holds NaN or infinity.
        """
        result = aligned_bytes(bundle.num_bytes)
        for matrix, rows in zip(bundle.matrices, data, strict=True):
            out = result[matrix.offset : matrix.offset + matrix.num_bytes]
            form, sizes = matrix.form, (matrix.rows, matrix.columns)
            pack(rows.reshape(-1), form.quant_type, *sizes, self._isa, out, family=form.family)
            self._finite.panel(matrix.tensor, matrix.form, matrix.columns, out.ctypes.data, rows)
        return result


def _bundles(
    layer: Layer, parts: Sequence[tuple[str, ...]], expert: int | None, isa: ISA, tuning: Tuning | None
) -> Iterator[ModelBundle]:
    for number, part in enumerate(parts):
        matrices: list[PackedMatrix] = []
        for attribute in part:
            tensor: TensorInfo = getattr(layer, attribute)
            if not has_panel_format(tensor.quant_type):
                raise UnsupportedModelError(
                    f"there is no kernel for tensor {tensor.name} of type {tensor.quant_type.name}",
                    hint="use a file quantised to another type",
                )
            rows, columns = (1, *tensor.shape)[-2:]
            offset = matrices[-1].offset + matrices[-1].num_bytes if matrices else 0
            form = chosen_format(tensor.quant_type, isa, tuning)
            matrices.append(PackedMatrix(tensor, form, offset, rows, columns))
        suffix = "" if expert is None else f".{expert}"
        yield ModelBundle(f"blk.{layer.index}.{'+'.join(part)}{suffix}", layer.index, expert, number, tuple(matrices))


def _packed_sample(quant_type: QuantType, form: PanelFormat, isa: ISA) -> NDArray[np.uint8]:
    """Panels of bytes that count on, of two groups of rows."""
    columns = SAMPLE_STEPS * max(form.layout.step_columns, quant_type.block_size)
    rows = 2 * form.group_rows
    data = np.arange(rows * quant_type.row_bytes(columns), dtype=np.uint32) * np.uint32(2654435761)
    return pack((data >> np.uint32(24)).astype(np.uint8), quant_type, rows, columns, isa, family=form.family)
