"""Routed experts as they lie in a GGUF file: which matrices one has, and the runs of raw rows that bring it to a GPU.

Knows nothing about GPUs, nor about which experts are wanted.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from offload.flash import READ_BYTES, Extent
from offload.gguf_tensors import TensorInfo

Look = Callable[[TensorInfo, NDArray[np.uint8]], None]
"""(tensor, raw rows (n, bytes of a row)): raises where they hold what no model may hold."""


@dataclass(frozen=True, slots=True)
class ExpertMatrix:
    """One of the matrices that every expert of a layer has; `quant_type` as GGUF names it."""

    quant_type: str
    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class RawRows:
    """A run of rows of an expert's matrix number `part`; `look`, if there is one, sees the bytes first."""

    part: int
    first_row: int
    extent: Extent
    look: Callable[[NDArray[np.uint8]], None] | None = None


class RawExperts(Protocol):
    """Where the experts of a model come from."""

    @property
    def most_bytes(self) -> int:
        """Of a run."""
        ...

    def matrices(self, layer: int) -> tuple[ExpertMatrix, ...]:
        """Of every expert of a layer; none for a layer without."""
        ...

    def runs(self, layer: int, expert: int) -> Sequence[RawRows]:
        """All rows of an expert, matrix after matrix."""
        ...


class GGUFExperts:
    """Experts of an open GGUF file, given the tensors that stack them: gate, up and down of a layer, as a rule.

    ValueError for a tensor that stacks none.
    """

    def __init__(
        self, tensors: Mapping[int, Sequence[TensorInfo]], *, look: Look | None = None, read_bytes: int = READ_BYTES
    ) -> None:
        self._tensors = {layer: tuple(stacks) for layer, stacks in tensors.items()}
        self._look = look
        self._read_bytes = read_bytes
        for tensor in (tensor for stacks in self._tensors.values() for tensor in stacks):
            if tensor.num_experts < 1 or len(tensor.shape) != 3:
                raise ValueError(f"tensor {tensor.name!r} of shape {tensor.shape} stacks no experts' matrices")
        self.most_bytes = max(
            (self._run_rows(tensor) * _row_bytes(tensor) for stacks in self._tensors.values() for tensor in stacks),
            default=0,
        )

    def matrices(self, layer: int) -> tuple[ExpertMatrix, ...]:
        """See `RawExperts`."""
        return tuple(
            ExpertMatrix(tensor.quant_type.name, tensor.shape[1], tensor.shape[2])
            for tensor in self._tensors.get(layer, ())
        )

    def runs(self, layer: int, expert: int) -> Sequence[RawRows]:
        """See `RawExperts`; runs of at most `read_bytes` unless a row is longer."""
        return [run for part, tensor in enumerate(self._tensors[layer]) for run in self._runs_of(part, tensor, expert)]

    def _runs_of(self, part: int, tensor: TensorInfo, expert: int) -> Sequence[RawRows]:
        offset, num_bytes = tensor.expert_slice(expert)
        row_bytes, step = _row_bytes(tensor), self._run_rows(tensor)
        look = None if self._look is None else _Looking(self._look, tensor, row_bytes)
        firsts = range(0, num_bytes // row_bytes, step)
        return [
            RawRows(
                part,
                first,
                Extent(tensor.shard, offset + first * row_bytes, min(step * row_bytes, num_bytes - first * row_bytes)),
                look,
            )
            for first in firsts
        ]

    def _run_rows(self, tensor: TensorInfo) -> int:
        return min(max(self._read_bytes // _row_bytes(tensor), 1), tensor.shape[1])


class _Looking:
    """Gives `look` what was read in rows."""

    __slots__ = ("_look", "_row_bytes", "_tensor")

    def __init__(self, look: Look, tensor: TensorInfo, row_bytes: int) -> None:
        self._look, self._tensor, self._row_bytes = look, tensor, row_bytes

    def __call__(self, data: NDArray[np.uint8]) -> None:
        self._look(self._tensor, data.reshape(-1, self._row_bytes))


def _row_bytes(tensor: TensorInfo) -> int:
    """Of a row of a stack of matrices."""
    return tensor.num_bytes // (tensor.shape[0] * tensor.shape[1])
