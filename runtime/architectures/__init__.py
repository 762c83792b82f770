"""The architectures that can be run, and `describe`, which turns a GGUF file into a `Model`."""

from runtime.architectures.base import Layer, Model
from runtime.architectures.registry import ARCHITECTURES, describe

__all__ = ["ARCHITECTURES", "Layer", "Model", "describe"]
