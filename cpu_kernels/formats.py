"""Which panel each quant type is packed into, and what it takes in memory. Knows nothing about files or tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from cpu_kernels import (
    dot_4bit,
    dot_5bit,
    dot_8bit,
    dot_codebook,
    dot_float,
    dot_k,
    dot_k_signed,
    dot_low,
    dot_ternary,
    lut,
)
from cpu_kernels.activations import ActivationBuffer, ActivationKind
from cpu_kernels.dot import Layout
from cpu_kernels.isa import ISA
from cpu_kernels.memory import ALIGNMENT
from cpu_kernels.pack_codebook import RUNS
from cpu_kernels.quant_types import QuantType
from cpu_kernels.tuning import TILES, Family, Tuning

_DOT_LAYOUTS: Mapping[str, Callable[[QuantType], Layout]] = {
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
    "TQ1_0": dot_ternary.TernaryDigits,
    "TQ2_0": dot_low.TernaryPlanes,
    "Q1_0": dot_low.OneBit,
    "Q2_0": dot_low.TwoBit,
}
_LAYOUTS = {Family.DOT: _DOT_LAYOUTS, Family.TABLES: lut.LAYOUTS}


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
        suffix = "_tables" if self.family is Family.TABLES else ""
        return self.quant_type.name.lower() + suffix

    @property
    def family(self) -> Family:
        """Which kernels multiply it."""
        return Family.TABLES if self.activation_kind is ActivationKind.TABLES else Family.DOT

    @property
    def group_rows(self) -> int:
        """Rows of a group; the last group of a matrix may have fewer and takes as much memory."""
        return self.isa.lanes

    @property
    def activation_kind(self) -> ActivationKind:
        """The activations its kernels take."""
        return self.layout.activation_kind

    def with_tile(self, columns: int) -> "PanelFormat":
        """The same panels, multiplied with tiles of so many columns; ValueError unless a power of two up to 16."""
        if columns not in TILES:
            raise ValueError(f"a tile of {columns} columns")
        return replace(self, isa=replace(self.isa, tile_columns=columns))

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


def has_panel_format(quant_type: QuantType, family: Family = Family.DOT) -> bool:
    """Whether there are kernels of a family for a type."""
    return quant_type.name in _LAYOUTS[family]


def panel_format(quant_type: QuantType, isa: ISA, family: Family = Family.DOT) -> PanelFormat:
    """The panels of a quant type; NotImplementedError where the family has no kernels for it."""
    if not has_panel_format(quant_type, family):
        tables = " by tables" if family is Family.TABLES else ""
        raise NotImplementedError(f"there is no kernel for {quant_type.name} weights{tables}")
    layout = _LAYOUTS[family][quant_type.name](quant_type)
    assert layout.step_columns % layout.activation_kind.block_columns == 0
    match layout.activation_kind:
        case ActivationKind.INT8:
            return PanelFormat(quant_type, isa, layout)
        case ActivationKind.FLOAT32:
            return PanelFormat(quant_type, isa.for_floats(), layout)
        case ActivationKind.TABLES:
            return PanelFormat(quant_type, isa.for_tables(), layout)


def chosen_format(quant_type: QuantType, isa: ISA, tuning: Tuning | None = None) -> PanelFormat:
    """The panels that a tuning chooses for a type; the default, dot products, where it says nothing or there is none.

    NotImplementedError for a type without such kernels, ValueError for a tuning of another ISA.
    """
    if tuning is None:
        return panel_format(quant_type, isa)
    if isa.name != tuning.isa:
        raise ValueError(f"kernels were tuned for {tuning.isa}, not for {isa.name}")
    choice = tuning.choices.get(quant_type.name)
    if choice is None:
        return panel_format(quant_type, isa)
    return panel_format(quant_type, isa, choice.family).with_tile(choice.tile_columns)


def can_follow(tuning: Tuning, isa: ISA) -> bool:
    """Whether a tuning is for this ISA and names only kernels that there are."""
    known = {family: _LAYOUTS[family].keys() for family in Family}
    return tuning.isa == isa.name and all(name in known[choice.family] for name, choice in tuning.choices.items())
