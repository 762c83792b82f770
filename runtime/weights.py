"""The weights of a model as float32 matrices: decoded once and kept, or kept as stored and decoded on every use.

Knows nothing about what a matrix is for. Invariants: weights that hold NaN or infinity are never handed out; without
`resident` a product has no more than `UNIT_WEIGHTS` decoded weights in memory at a time; products are cut at the same
rows either way, so that both ways give the same bits.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import linear

from cpu_kernels.reference.dequantize import dequantize
from offload.errors import ModelFormatError
from offload.gguf import GGUFFile, TensorInfo
from runtime.architectures.base import Model

UNIT_WEIGHTS = 1 << 24  # 64 MiB as float32
SMALL_WEIGHTS = 1 << 14  # norms, biases, small routers: always kept decoded

Progress = Callable[[int, int], None]


class Weights:
    """The weights of `model`, read from `gguf`, which must stay open until `load` has returned."""

    def __init__(self, gguf: GGUFFile, model: Model, *, resident: bool, device: torch.device) -> None:
        """`resident`: float32 on `device` for good; else bytes in RAM, decoded and sent to `device` on use."""
        self._gguf = gguf
        self._model = model
        self._resident = resident
        self._device = device
        self._decoded: dict[str, torch.Tensor] = {}
        self._stored: dict[str, NDArray[np.uint8]] = {}  # (all rows, row bytes)
        self._finite: set[tuple[str, int, int]] = set()

    @property
    def num_bytes(self) -> int:
        """Bytes held, on the device and in RAM."""
        decoded = sum(tensor.nbytes for tensor in self._decoded.values())
        return decoded + sum(stored.nbytes for stored in self._stored.values())

    def load(self, progress: Progress | None = None) -> None:
        """Reads every tensor of the model; `progress(done, total)` hears of the bytes read so far.

        FlashError if reading fails; ModelFormatError naming a tensor that holds NaN or infinity (those that are kept
        as stored: on first use).
        """
        tensors = [tensor for _, tensor in self._model.tensors()]
        total = sum(tensor.num_bytes for tensor in tensors)
        done = 0
        for tensor in tensors:
            for num_bytes in self._load(tensor):
                done += num_bytes
                if progress is not None:
                    progress(done, total)

    def matrix(self, tensor: TensorInfo, expert: int | None = None) -> torch.Tensor:
        """A tensor, or one expert of a stacked one, as float32 of its shape: (outputs, inputs) for a matrix."""
        decoded = self._decoded.get(tensor.name)
        if decoded is not None:
            return decoded if expert is None else decoded[expert]
        shape = tensor.shape if expert is None else tensor.shape[1:]
        return torch.cat([*self._units(tensor, expert)]).reshape(shape)

    def rows(self, tensor: TensorInfo, ids: Sequence[int]) -> torch.Tensor:
        """The chosen rows of a matrix: (len(ids), inputs)."""
        decoded = self._decoded.get(tensor.name)
        if decoded is not None:
            return decoded[torch.tensor(ids, device=decoded.device)]
        chosen = torch.from_numpy(dequantize(self._stored[tensor.name][np.asarray(ids)], tensor.quant_type))
        self._check_finite(tensor, chosen)
        return chosen.to(self._device)

    def product(self, x: torch.Tensor, tensor: TensorInfo, expert: int | None = None) -> torch.Tensor:
        """x (tokens, inputs) times the transposed matrix: (tokens, outputs)."""
        parts = [linear(x, unit) for unit in self._units(tensor, expert)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _units(self, tensor: TensorInfo, expert: int | None) -> Iterator[torch.Tensor]:
        """The rows of a matrix or expert in order, at most `UNIT_WEIGHTS` weights at a time."""
        for start, stop in _parts(tensor, expert):
            yield self._unit(tensor, start, stop)

    def _unit(self, tensor: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of a tensor, all experts' rows counted: (stop - start, columns)."""
        decoded = self._decoded.get(tensor.name)
        if decoded is not None:
            return decoded.view(-1, decoded.shape[-1])[start:stop]
        unit = torch.from_numpy(dequantize(self._stored[tensor.name][start:stop], tensor.quant_type))
        if (tensor.name, start, stop) not in self._finite:
            self._check_finite(tensor, unit)
            self._finite.add((tensor.name, start, stop))
        return unit.to(self._device)

    def _load(self, tensor: TensorInfo) -> Iterator[int]:
        """Reads a tensor part by part, yielding the bytes of each."""
        is_float32 = tensor.quant_type.name == "F32"  # as small as stored
        if not (self._resident or is_float32 or tensor.num_elements <= SMALL_WEIGHTS):
            rows, _ = _rows_and_columns(tensor)
            stored = self._stored[tensor.name] = np.empty((rows, tensor.num_bytes // rows), np.uint8)
            for start, stop in _parts(tensor):
                self._gguf.read_into(tensor, stored[start:stop], start=start * stored.shape[1])
                yield stored[start:stop].nbytes
            return
        decoded = np.empty(_rows_and_columns(tensor), np.float32)
        row_bytes = tensor.num_bytes // max(len(decoded), 1)
        for start, stop in _parts(tensor):
            part = decoded[start:stop]
            if is_float32:
                self._gguf.read_into(tensor, part.view(np.uint8), start=start * row_bytes)
            else:
                raw = np.empty((stop - start, row_bytes), np.uint8)
                self._gguf.read_into(tensor, raw, start=start * row_bytes)
                part[...] = dequantize(raw, tensor.quant_type)
            self._check_finite(tensor, torch.from_numpy(part))
            yield (stop - start) * row_bytes
        self._decoded[tensor.name] = torch.from_numpy(decoded).reshape(tensor.shape).to(self._device)

    def _check_finite(self, tensor: TensorInfo, weights: torch.Tensor) -> None:
        # a sum is finite unless a weight is not, or it overflows; the second look tells the two apart
        if not torch.isfinite(weights.sum()) and not torch.isfinite(weights).all():
            raise ModelFormatError(
                f"{self._gguf.path}: tensor {tensor.name} holds weights that are not finite numbers",
                hint="the file is damaged, or was converted from a damaged model; fetch it again",
            )


def _rows_and_columns(tensor: TensorInfo) -> tuple[int, int]:
    columns = tensor.shape[-1]
    return (tensor.num_elements // columns if columns else 0), columns


def _parts(tensor: TensorInfo, expert: int | None = None) -> Iterator[tuple[int, int]]:
    """(start, stop) of the rows of a tensor or of one expert, in parts of at most `UNIT_WEIGHTS` weights."""
    rows, columns = _rows_and_columns(tensor)
    first = 0
    if expert is not None:
        rows //= tensor.shape[0]
        first = expert * rows
    step = max(1, UNIT_WEIGHTS // max(columns, 1))
    for start in range(first, first + rows, step):
        yield start, min(start + step, first + rows)
