"""Where each tensor of a GGUF file lies: name, type, shape, shard, offset, bytes.

Knows nothing about metadata keys or how a tensor is used, except that a name with `_exps.` stacks experts. All sizes
are Python integers: no product of a file's numbers can overflow. Invariant of `lay_out`: the bytes of every tensor
it returns lie inside the data section and belong to no other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cpu_kernels.quant_types import QuantType
from offload.errors import ModelFormatError, UnsupportedModelError
from offload.source import FileName

MAX_DIMENSIONS = 4
MAX_ELEMENTS = 2**63 - 1


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor; `shape` in numpy order ((rows, columns), experts first), `offset` absolute in shard `shard`."""

    name: str
    quant_type: QuantType
    shape: tuple[int, ...]
    shard: int
    offset: int
    num_bytes: int

    @property
    def num_elements(self) -> int:
        """Product of the dimensions; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def num_experts(self) -> int:
        """Experts stacked along the first dimension; 0 where the tensor is not of experts."""
        return self.shape[0] if "_exps." in self.name and len(self.shape) > 1 else 0

    def expert_slice(self, expert: int) -> tuple[int, int]:
        """(absolute offset, bytes) of one expert; IndexError outside of 0..num_experts-1.

        UnsupportedModelError for an unknown quant type, whose size is only an upper bound.
        """
        if not 0 <= expert < self.num_experts:
            raise IndexError(f"expert {expert} of tensor {self.name!r}, which stacks {self.num_experts}")
        if not self.quant_type.is_known:
            raise UnsupportedModelError(
                f"{self.quant_type.name} of tensor {self.name!r} is not supported",
                hint="use a file quantised to a known type",
            )
        size = self.num_bytes // self.num_experts
        return self.offset + expert * size, size


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One line of a file's tensor table, as written: `offset` relative to the data section, `position` of the line."""

    name: str
    quant_type: QuantType
    shape: tuple[int, ...]
    offset: int
    position: int


def needed_bytes(entry: TensorEntry) -> int:
    """Bytes the type and shape need; 0 for an unknown type."""
    quant_type = entry.quant_type
    if not quant_type.is_known:
        return 0
    return math.prod(entry.shape) // quant_type.block_size * quant_type.block_bytes


def check_entry(path: FileName, entry: TensorEntry, alignment: int) -> None:
    """ModelFormatError if the line cannot be true by itself: too many weights, a cut block, a misaligned offset."""
    where = f"{path}: tensor {entry.name!r} (table entry at byte {entry.position})"
    elements = math.prod(size for size in entry.shape if size)  # a zero must not hide an absurd dimension
    if elements > MAX_ELEMENTS:
        raise _broken(f"{where} claims {'x'.join(map(str, entry.shape))} weights, more than 2^63 - 1")
    columns, quant_type = (entry.shape[-1] if entry.shape else 1), entry.quant_type
    if quant_type.is_known and columns % quant_type.block_size:
        raise _broken(
            f"{where} has rows of {columns} weights, not a multiple of the {quant_type.block_size} of a "
            f"{quant_type.name} block"
        )
    if entry.offset % alignment:
        raise _broken(f"{where} begins at data offset {entry.offset}, not a multiple of the alignment {alignment}")


def lay_out(
    path: FileName, shard: int, entries: Sequence[TensorEntry], data_start: int, file_size: int
) -> dict[str, TensorInfo]:
    """Absolute regions in the order of the table; ModelFormatError if one leaves the file or runs into another.

    A tensor of unknown type is given the bytes up to the next tensor, or to the end of the file.
    """
    data_size = max(0, file_size - data_start)
    ordered = sorted(entries, key=lambda entry: (entry.offset, _least_bytes(entry), needed_bytes(entry)))
    sizes: dict[str, int] = {}
    for index, entry in enumerate(ordered):
        following = ordered[index + 1] if index + 1 < len(ordered) else None
        limit = following.offset if following else data_size
        size = needed_bytes(entry) if entry.quant_type.is_known else max(0, limit - entry.offset)
        if following and entry.offset + max(size, _least_bytes(entry)) > following.offset:
            raise _overlap(path, entry, following, size)
        if size and entry.offset + size > data_size:
            raise _cut(path, entry, data_start + entry.offset, size, file_size)
        sizes[entry.name] = size
    return {
        entry.name: TensorInfo(
            name=entry.name,
            quant_type=entry.quant_type,
            shape=entry.shape,
            shard=shard,
            offset=data_start + entry.offset,
            num_bytes=sizes[entry.name],
        )
        for entry in entries
    }


def _least_bytes(entry: TensorEntry) -> int:
    """1 for a tensor that holds weights, whatever its type: it cannot begin where another one does."""
    return 1 if math.prod(entry.shape) else 0


def _broken(message: str) -> ModelFormatError:
    return ModelFormatError(message, hint="the file is damaged or was written by a broken tool: download it again")


def _cut(path: FileName, entry: TensorEntry, start: int, size: int, file_size: int) -> ModelFormatError:
    return ModelFormatError(
        f"{path}: tensor {entry.name!r} ({entry.quant_type.name}) needs bytes {start} to {start + size}, "
        f"but the file ends at byte {file_size}",
        hint="the download was cut short: download the file again",
    )


def _overlap(path: FileName, entry: TensorEntry, following: TensorEntry, size: int) -> ModelFormatError:
    return ModelFormatError(
        f"{path}: tensor {entry.name!r} ({entry.quant_type.name}, {'x'.join(map(str, entry.shape))}) needs {size} "
        f"bytes at data offset {entry.offset}, but tensor {following.name!r} begins "
        f"{following.offset - entry.offset} bytes after it",
        hint="the file was written by a broken tool: use another conversion of this model",
    )
