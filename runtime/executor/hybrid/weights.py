"""The weights of the GPU's parts, in its memory: matrices as `GpuMatrix`, vectors as float32.

Matrices that are multiplied with the same activations lie in one where their types are the same. Knows nothing about
routed experts or about what a part computes. Invariant: a matrix that holds NaN or infinity is never handed out.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch

from cpu_kernels.reference.dequantize import dequantize
from gpu_kernels.device import Cost, GpuDevice, Stream
from gpu_kernels.kernels import Kernels
from gpu_kernels.matrix import GpuMatrix
from offload.errors import UnsupportedModelError
from offload.gguf import GGUFFile, TensorInfo
from runtime.architectures.base import Model
from runtime.bundles import layer_bundles
from runtime.executor.hybrid.finite_sums import FiniteSums
from runtime.finite import FiniteCheck
from runtime.panels import PanelWeights

UNIT_BYTES = 4 << 20  # of a matrix that are sent at once


class GpuWeights:
    """Those of the matrices of `model` that `names` tells; vectors are those of `host` and are sent when asked for."""

    def __init__(
        self,
        gguf: GGUFFile,
        model: Model,
        names: frozenset[str],
        host: PanelWeights,
        device: GpuDevice,
        stream: Stream,
        kernels: Kernels,
    ) -> None:
        self._gguf, self._model, self._names, self._host = gguf, model, names, host
        self._device, self._stream = device, stream
        self._sums = FiniteSums(device, stream, kernels)
        self._matrices: dict[str, GpuMatrix] = {}
        self._joined: dict[tuple[str, ...], GpuMatrix] = {}
        self._vectors: dict[str, torch.Tensor] = {}

    @property
    def file_bytes(self) -> int:
        """Bytes of all matrices."""
        return sum(tensor.num_bytes for tensor in self._tensors())

    def matrix(self, tensor: TensorInfo) -> GpuMatrix:
        """A matrix; KeyError for one that is not the GPU's."""
        return self._matrices[tensor.name]

    def joined(self, tensors: Sequence[TensorInfo]) -> GpuMatrix | None:
        """One matrix of the rows of all, in that order; None if they do not lie so."""
        return self._joined.get(tuple(tensor.name for tensor in tensors))

    def vector(self, tensor: TensorInfo) -> torch.Tensor:
        """A norm's weights, a bias or factors, float32; torch.OutOfMemoryError when it is first sent."""
        if tensor.name not in self._vectors:
            values = torch.from_numpy(self._host.vector(tensor))
            vector = self._device.empty(values.shape, torch.float32)
            self._stream.copy(vector, values)
            self._stream.synchronize()
            self._vectors[tensor.name] = vector
        return self._vectors[tensor.name]

    def factor(self, tensor: TensorInfo) -> float:
        """A matrix's factor."""
        return float(self._host.vector(tensor)[0])

    def load(self) -> Iterator[int]:
        """Sends everything, yielding the file's bytes that are done. Errors as `PanelWeights.load`.

        torch.OutOfMemoryError where the GPU has too little memory, UnsupportedModelError for a type it has no kernel
        for.
        """
        tensors = list(self._tensors())
        row_bytes = max((tensor.quant_type.row_bytes(tensor.shape[-1]) for tensor in tensors), default=1)
        size = max(min(UNIT_BYTES, max((tensor.num_bytes for tensor in tensors), default=1)), row_bytes)
        host, raw = self._device.pinned((size,), torch.uint8), self._device.empty((size,), torch.uint8)
        finite = FiniteCheck(self._gguf.path)
        for bundle in self._bundles():
            for tensor in self._allocate(bundle):
                yield from self._send(tensor, host, raw)
                self._check(tensor, finite)

    def _bundles(self) -> Iterator[list[TensorInfo]]:
        """Matrices with the same inputs together."""
        for layer in self._model.layers:
            for names in layer_bundles(layer):
                bundle = [tensor for name in names if (tensor := getattr(layer, name)).name in self._names]
                if bundle:
                    yield bundle
        if self._model.output.name in self._names:
            yield [self._model.output]

    def _tensors(self) -> Iterator[TensorInfo]:
        for bundle in self._bundles():
            yield from bundle

    def _allocate(self, bundle: list[TensorInfo]) -> list[TensorInfo]:
        """Gives the matrices of a bundle their memory; returns them."""
        if len({(tensor.quant_type, tensor.shape[-1]) for tensor in bundle}) > 1:
            for tensor in bundle:
                self._allocate([tensor])
            return bundle
        sizes = [_rows(tensor) for tensor in bundle]
        first = bundle[0]
        try:
            whole = GpuMatrix.allocate(first.quant_type.name, sum(sizes), first.shape[-1], empty=self._device.empty)
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"{self._gguf.path}: tensor {first.name} cannot be the GPU's: {error}", hint="run it with --gpu off"
            ) from error
        self._joined[tuple(tensor.name for tensor in bundle)] = whole
        start = 0
        for tensor, rows in zip(bundle, sizes, strict=True):
            self._matrices[tensor.name] = whole.rows_from(start, rows)
            start += rows
        return bundle

    def _send(self, tensor: TensorInfo, host: torch.Tensor, raw: torch.Tensor) -> Iterator[int]:
        matrix = self._matrices[tensor.name]
        step = max(1, len(raw) // matrix.row_bytes)
        for first in range(0, matrix.rows, step):
            rows = min(step, matrix.rows - first)
            size = rows * matrix.row_bytes
            self._gguf.read_into(tensor, host[:size].numpy(), start=first * matrix.row_bytes)
            self._stream.copy(raw[:size], host[:size])
            write = partial(matrix.write, None, raw[:size].view(rows, -1), first)
            self._stream.launch(write, Cost(2 * size), "arrange")
            self._stream.synchronize()
            yield size

    def _check(self, tensor: TensorInfo, finite: FiniteCheck) -> None:
        """ModelFormatError if a weight is none: decoding tells those from sums that are too great."""
        matrix = self._matrices[tensor.name]
        wrong = self._sums.rows_without(matrix)
        if len(wrong):
            rows = self._gguf.read(tensor).reshape(matrix.rows, matrix.row_bytes)[wrong]
            with np.errstate(invalid="ignore", over="ignore"):
                finite.values(tensor, dequantize(rows, tensor.quant_type))


def _rows(tensor: TensorInfo) -> int:
    """Of a matrix, or of a vector that is multiplied as one row."""
    return 1 if len(tensor.shape) == 1 else tensor.shape[0]
