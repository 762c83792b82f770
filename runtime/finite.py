"""A check that weights are finite numbers, so that damage is named when it is first met. Knows nothing about layers."""

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.formats import PanelFormat
from cpu_kernels.panel_rows import PanelSums
from cpu_kernels.reference.dequantize import dequantize
from gpu_kernels.layouts import LAYOUTS
from offload.errors import ModelFormatError
from offload.gguf import TensorInfo
from offload.source import FileName


class FiniteCheck:
    """Raises ModelFormatError naming a tensor of the file at `path` that holds NaN or infinity. For any thread."""

    def __init__(self, path: FileName) -> None:
        self._path = path
        self._sums: dict[tuple[str, int], PanelSums] = {}

    def panel(self, tensor: TensorInfo, form: PanelFormat, columns: int, address: int, data: NDArray[np.uint8]) -> None:
        """Looks at panels that were packed from `data`, (rows, bytes of a row).

        A row's sum is finite unless a weight is not, or it overflows; decoding tells the two apart.
        """
        key = (form.name, columns)
        if key not in self._sums:
            self._sums[key] = PanelSums(form, columns)
        sums = self._sums[key].of(address, len(data))
        if not np.isfinite(sums).all():
            with np.errstate(invalid="ignore", over="ignore"):
                self.values(tensor, dequantize(data[~np.isfinite(sums)], tensor.quant_type))

    def rows(self, tensor: TensorInfo, data: NDArray[np.uint8]) -> None:
        """Looks at raw rows, (rows, bytes of a row).

        Weights are finite where the floats of their quant blocks are; blocks without floats of their own are decoded.
        """
        block = LAYOUTS[tensor.quant_type.name]
        blocks = data.reshape(len(data), -1, block.block_bytes)
        floats = [
            np.ascontiguousarray(blocks[..., field.offset : field.offset + field.num_bytes]).view(field.dtype)
            for field in block.fields
            if field.dtype.startswith("float")
        ]
        suspect = np.full(len(data), not floats)
        for numbers in floats:
            suspect |= ~np.isfinite(numbers).all(axis=(1, 2))
        if suspect.any():
            with np.errstate(invalid="ignore", over="ignore"):
                self.values(tensor, dequantize(data[suspect], tensor.quant_type))

    def values(self, tensor: TensorInfo, values: NDArray[np.float32]) -> None:
        """Looks at decoded weights."""
        if not np.isfinite(values).all():
            raise ModelFormatError(
                f"{self._path}: tensor {tensor.name} holds weights that are not finite numbers",
                hint="the file is damaged, or was converted from a damaged model; fetch it again",
            )
