"""Which panel each quant type is packed into, and what it takes in memory. Knows nothing about files or tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cpu_kernels import dot_4bit, dot_5bit, dot_8bit, dot_codebook, dot_float, dot_k, dot_k_signed, dot_low
from cpu_kernels.activations import BLOCK, ActivationBuffer, ActivationKind
from cpu_kernels.dot import Layout
from cpu_kernels.isa import ISA
from cpu_kernels.memory import ALIGNMENT
from cpu_kernels.pack_codebook import RUNS
from cpu_kernels.quant_types import QuantType

_LAYOUTS: Mapping[str, Callable[[QuantType], Layout]] = {
    "F32": dot_float.FloatWeights,
    "F16": dot_float.FloatWeights,
    "BF16": dot_float.FloatWeights,
    "Q8_0": dot_8bit.EightBit,
    "Q4_0": dot_4bit.OffsetNibbles,
    "Q4_1": dot_4bit.ShiftedNibbles,
    "Q5_0": dot_5bit.OffsetFiveBit,
    "Q5_1": dot_5bit.ShiftedFiveBit,
    "IQ4_NL": dot_4bit.TableNibbles,
    "MXFP4": dot_4bit.ScaledFloats,
    "NVFP4": dot_4bit.ScaledFloatsOf16,
    "Q2_K": dot_k.TwoBitK,
    "Q3_K": dot_k_signed.ThreeBitK,
    "Q4_K": dot_k.FourBitK,
    "Q5_K": dot_k.FiveBitK,
    "Q6_K": dot_k_signed.SixBitK,
    "IQ4_XS": dot_k_signed.TableNibblesK,
    **dict.fromkeys(RUNS, dot_codebook.Codebook),
    "TQ1_0": dot_low.TernaryDigits,
    "TQ2_0": dot_low.TernaryPlanes,
    "Q1_0": dot_low.OneBit,
    "Q2_0": dot_low.TwoBit,
}


@dataclass(frozen=True, slots=True)
class PanelFormat:
    """Panels of one quant type. A group of `group_rows` rows is one stream of bytes.

    `isa` is what kernels and activations are made for: of the ISA asked for, the form that is best for this type.
    """

    quant_type: QuantType
    isa: ISA
    layout: Layout

    @property
    def name(self) -> str:
        """What kernels for it are called."""
        return self.quant_type.name.lower()

    @property
    def group_rows(self) -> int:
        """Rows of a group; the last group of a matrix may have fewer and takes as much memory."""
        return self.isa.lanes

    @property
    def activation_kind(self) -> ActivationKind:
        """The activations its kernels take."""
        return self.layout.activation_kind

    def activations(self, k: int, capacity: int) -> ActivationBuffer:
        """A buffer for up to `capacity` columns of `k` values, as kernels of this format take them."""
        return ActivationBuffer.allocate(self.activation_kind, k, capacity, self.isa)

    def groups(self, rows: int) -> int:
        """Row groups of a matrix: the work items of a product."""
        return -(-rows // self.group_rows)

    def steps(self, columns: int) -> int:
        """Steps of a row; ValueError where a quant block would be cut."""
        self.quant_type.row_bytes(columns)
        return -(-columns // self.layout.step_columns)

    def group_bytes(self, columns: int) -> int:
        """Bytes of one row group."""
        return self.steps(columns) * self.layout.step_row_bytes * self.group_rows

    def panel_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a whole matrix in panels; its start must be aligned to 64. ValueError for sizes that cannot be."""
        if rows < 1 or columns < 1:
            raise ValueError(f"a matrix of {rows} x {columns}")
        return -(-self.groups(rows) * self.group_bytes(columns) // ALIGNMENT) * ALIGNMENT


def has_panel_format(quant_type: QuantType) -> bool:
    """Whether there are kernels for a type."""
    return quant_type.name in _LAYOUTS


def panel_format(quant_type: QuantType, isa: ISA) -> PanelFormat:
    """The panels of a quant type; NotImplementedError where there are no kernels for it."""
    if not has_panel_format(quant_type):
        raise NotImplementedError(f"there is no kernel for {quant_type.name} weights")
    layout = _LAYOUTS[quant_type.name](quant_type)
    assert layout.step_columns % BLOCK == 0
    is_float = layout.activation_kind is ActivationKind.FLOAT32
    return PanelFormat(quant_type, isa.for_floats() if is_float else isa, layout)
