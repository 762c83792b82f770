"""A matrix as the products of a program find it in memory. Knows nothing about how it got there."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cpu_kernels.expert_slots import ExpertSlots
from cpu_kernels.formats import PanelFormat


@dataclass(frozen=True, slots=True)
class SlotPart:
    """Where stacked experts lie that come and go: the tables, the layer's number in them, and the part of a slot."""

    slots: ExpertSlots
    layer: int
    part: int


@dataclass(frozen=True, slots=True)
class Panel:
    """A matrix (rows, columns) in panels at `address`, or as many as there are experts, `expert_bytes` apart.

    With a `place` there are as many as there are slots, `address` is in the first, and the tables tell whose is where.
    """

    form: PanelFormat
    address: int
    rows: int
    columns: int
    experts: int = 1
    expert_bytes: int = 0
    place: SlotPart | None = None


def joined(panels: Sequence[Panel]) -> Panel | None:
    """One panel of all rows, in that order, if they lie so in memory; None if they do not."""
    first = panels[0]
    rows = 0
    for panel in panels:
        if panel.form.quant_type != first.form.quant_type or panel.columns != first.columns:
            return None
        whole_groups, rest = divmod(rows, first.form.group_rows)
        if rest or panel.address != first.address + whole_groups * first.form.group_bytes(first.columns):
            return None
        rows += panel.rows
    return replace(first, rows=rows)
