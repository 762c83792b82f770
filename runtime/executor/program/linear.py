"""A matrix with what belongs to it. Knows nothing about where weights lie."""

from dataclasses import dataclass

from offload.gguf import TensorInfo
from runtime.architectures.base import Layer


@dataclass(frozen=True, slots=True)
class Linear:
    """A matrix, its factor and its bias."""

    weight: TensorInfo
    scale: TensorInfo | None = None
    bias: TensorInfo | None = None

    @classmethod
    def of(cls, layer: Layer, name: str) -> "Linear":
        """The layer's matrix of that name with what belongs to it."""
        weight = getattr(layer, name)
        assert weight is not None, "a checked description has every matrix that its layers use"
        return cls(weight, getattr(layer, f"{name}_scale", None), getattr(layer, f"{name}_bias", None))

    @property
    def is_plain(self) -> bool:
        """Whether it is nothing but a matrix."""
        return self.scale is None and self.bias is None
