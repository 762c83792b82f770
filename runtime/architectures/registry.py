"""Which architectures there are, by the name that `general.architecture` gives them.

Knows nothing of their particulars.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from offload.errors import UnsupportedModelError
from offload.gguf import GGUFFile
from runtime.architectures import bitnet, gemma3, llama, olmoe, phi3, qwen2, qwen2moe, qwen3, qwen3moe
from runtime.architectures.base import Model

ARCHITECTURES: Mapping[str, Callable[[GGUFFile], Model]] = MappingProxyType(
    {
        module.FAMILY.name: module.describe
        for module in (bitnet, gemma3, llama, olmoe, phi3, qwen2, qwen2moe, qwen3, qwen3moe)
    }
)


def describe(gguf: GGUFFile) -> Model:
    """The model in a file.

    UnsupportedModelError for an unknown architecture, RoPE scaling, quant type or tensor; ModelFormatError for
    metadata out of bounds, a missing tensor, or one whose shape contradicts the metadata.
    """
    family = ARCHITECTURES.get(gguf.architecture)
    if family is None:
        raise UnsupportedModelError(
            f"{gguf.path}: architecture {gguf.architecture!r} is not supported; known: {', '.join(ARCHITECTURES)}",
            hint="--engine llama.cpp runs it if llama-cpp-python knows it",
        )
    return family(gguf)
