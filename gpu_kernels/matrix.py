"""A weight matrix, or a stack of them, as GPU kernels read it: the planes of its quant blocks.

Knows nothing about files, decoding or products. The planes hold the bytes of the GGUF tensor, permuted, so a matrix
takes as many bytes as in the file; they are filled on whatever device they lie, by strided copies from raw GGUF rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from gpu_kernels.layouts import BlockLayout, layout

Allocate = Callable[[Sequence[int], torch.dtype], torch.Tensor]  # (shape, dtype) -> memory with arbitrary contents


@dataclass(frozen=True, slots=True)
class GpuMatrix:
    """`rows` x `columns` weights of a quant type; with `slots` as many of them, for experts.

    `planes`: for every field of the layout a contiguous tensor ([slots,] rows, blocks of a row * numbers of the field).
    """

    quant_type: str
    rows: int
    columns: int
    planes: tuple[torch.Tensor, ...]
    slots: int | None = None

    @classmethod
    def allocate(
        cls, quant_type: str, rows: int, columns: int, *, slots: int | None = None, empty: Allocate | None = None
    ) -> "GpuMatrix":
        """Memory for a matrix; `empty` gives it (None: on the CPU).

        NotImplementedError for a quant type without a layout, ValueError for cut blocks or sizes below 1.
        """
        block = layout(quant_type)
        blocks = block.blocks(columns)
        if rows < 1 or (slots is not None and slots < 1):
            raise ValueError(f"a matrix of {rows} rows in {slots} slots")
        leading = (rows,) if slots is None else (slots, rows)
        make = empty or (lambda shape, dtype: torch.empty(tuple(shape), dtype=dtype))
        planes = tuple(make((*leading, blocks * field.count), getattr(torch, field.dtype)) for field in block.fields)
        return cls(quant_type, rows, columns, planes, slots)

    @property
    def layout(self) -> BlockLayout:
        """Of its quant blocks."""
        return layout(self.quant_type)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.layout.row_bytes(self.columns)

    @property
    def num_bytes(self) -> int:
        """Bytes of everything; those of the GGUF tensor."""
        return self.row_bytes * self.rows * (self.slots or 1)

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.planes[0].device

    def plane(self, name: str) -> torch.Tensor:
        """The plane of the field of that name; KeyError if the quant type has none."""
        for field, tensor in zip(self.layout.fields, self.planes, strict=True):
            if field.name == name:
                return tensor
        raise KeyError(f"{self.quant_type} blocks have no field {name!r}")

    def slot(self, index: int) -> "GpuMatrix":
        """One matrix of a stack; a view. ValueError if this is no stack or has no such slot."""
        if self.slots is None or not 0 <= index < self.slots:
            raise ValueError(f"slot {index} of {self.slots}")
        return GpuMatrix(self.quant_type, self.rows, self.columns, tuple(plane[index] for plane in self.planes))

    def rows_from(self, first: int, count: int) -> "GpuMatrix":
        """A run of rows of a single matrix; a view. ValueError if there is none."""
        if self.slots is not None or first < 0 or count < 1 or first + count > self.rows:
            raise ValueError(f"rows {first} to {first + count - 1} of {self.rows} (slots: {self.slots})")
        planes = tuple(plane[first : first + count] for plane in self.planes)
        return GpuMatrix(self.quant_type, count, self.columns, planes)

    def write(self, slot: int | None, raw: torch.Tensor, first_row: int = 0) -> None:
        """Fills rows of a slot (None: of a single matrix) from raw GGUF rows, uint8 (n, row_bytes) on the same device.

        ValueError for rows that do not fit, TypeError for anything but bytes.
        """
        if raw.dtype != torch.uint8:
            raise TypeError(f"raw rows must be uint8, not {raw.dtype}")
        if raw.ndim != 2 or raw.shape[1] != self.row_bytes or raw.stride(1) != 1:
            raise ValueError(f"raw rows of shape {tuple(raw.shape)} for rows of {self.row_bytes} bytes")
        if (slot is None) != (self.slots is None):
            raise ValueError(f"writing slot {slot} of a matrix with slots {self.slots}")
        target = self if slot is None else self.slot(slot)
        if first_row < 0 or first_row + raw.shape[0] > self.rows:
            raise ValueError(f"rows {first_row} to {first_row + raw.shape[0] - 1} of {self.rows}")
        block = self.layout
        blocks = raw.view(raw.shape[0], -1, block.block_bytes)  # (n, blocks of a row, block_bytes)
        for field, plane in zip(block.fields, target.planes, strict=True):
            rows = plane[first_row : first_row + raw.shape[0]].view(torch.uint8)
            part = blocks[..., field.offset : field.offset + field.num_bytes]
            rows.view(part.shape).copy_(part)


def arrange(raw: torch.Tensor, quant_type: str, *, empty: Allocate | None = None) -> GpuMatrix:
    """A new matrix from raw GGUF bytes ([slots,] rows, row_bytes) uint8, contiguous, on their device unless `empty`."""
    block = layout(quant_type)
    if raw.ndim not in {2, 3} or raw.shape[-1] % block.block_bytes:
        raise ValueError(f"bytes of shape {tuple(raw.shape)} are not rows of whole {quant_type} blocks")
    columns = raw.shape[-1] // block.block_bytes * block.block_size
    make = empty or (lambda shape, dtype: torch.empty(tuple(shape), dtype=dtype, device=raw.device))
    slots = raw.shape[0] if raw.ndim == 3 else None
    matrix = GpuMatrix.allocate(quant_type, raw.shape[-2], columns, slots=slots, empty=make)
    for slot in [None] if slots is None else range(slots):
        matrix.write(slot, raw if slot is None else raw[slot])
    return matrix
