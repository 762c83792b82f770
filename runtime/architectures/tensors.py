"""Looks up the tensors of a model by GGUF name, checks each one's shape and type, and knows which were left out.

Knows nothing about what a tensor is for. Invariant: a tensor that is handed out has the expected shape and a quant
type that can be read.
"""

from cpu_kernels.reference.dequantize import dequantizable
from offload.errors import ModelFormatError, UnsupportedModelError
from offload.gguf import GGUFFile, TensorInfo

MAX_VOCABULARY = 1 << 24


class TensorTable:
    """The tensors of one file; shapes are (outputs, inputs), leading ones are of no account."""

    def __init__(self, gguf: GGUFFile) -> None:
        self._gguf = gguf
        self._taken: set[str] = set()

    def required(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        """The tensor; ModelFormatError if it is not there or has another shape, UnsupportedModelError for its type."""
        tensor = self.optional(name, shape)
        if tensor is None:
            raise ModelFormatError(
                f"{self._gguf.path}: tensor {name} is missing", hint="the file is incomplete or was converted wrongly"
            )
        return tensor

    def optional(self, name: str, shape: tuple[int, ...]) -> TensorInfo | None:
        """The tensor or None; errors as `required`."""
        tensor = self._gguf.tensors.get(name)
        if tensor is None:
            return None
        if _squeezed(tensor.shape) != _squeezed(shape):
            raise ModelFormatError(
                f"{self._gguf.path}: tensor {name} has the shape {tensor.shape}, not {shape} as the metadata says",
                hint="the file is damaged or was converted wrongly",
            )
        if not dequantizable(tensor.quant_type):
            raise UnsupportedModelError(
                f"{self._gguf.path}: {tensor.quant_type.name} of tensor {name} is not supported",
                hint="use another quantisation of this model, or --engine llama.cpp",
            )
        self._taken.add(name)
        return tensor

    def rows(self, name: str, columns: int) -> TensorInfo:
        """A matrix of that many columns and as many rows as it has."""
        tensor = self._gguf.tensors.get(name)
        rows = tensor.shape[0] if tensor is not None and tensor.shape else 1
        return self.required(name, (min(max(rows, 1), MAX_VOCABULARY), columns))

    def refuse_leftovers(self) -> None:
        """UnsupportedModelError if the file has tensors that nobody asked for: the result would lack their part."""
        left = [name for name in self._gguf.tensors if name not in self._taken]
        if left:
            shown = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
            raise UnsupportedModelError(
                f"{self._gguf.path}: {self._gguf.architecture} models have no part for {shown}",
                hint="the file may belong to a newer kind of model; try --engine llama.cpp",
            )


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    first = next((axis for axis, size in enumerate(shape) if size != 1), max(len(shape) - 1, 0))
    return tuple(shape[first:])
