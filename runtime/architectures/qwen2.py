"""Qwen 2 and 2.5, dense: biases on queries, keys and values."""

from offload.gguf import GGUFFile
from runtime.architectures.base import Model, RopeOrder
from runtime.architectures.describe import describe_family
from runtime.architectures.family import SELF_ATTENTION, Family

FAMILY = Family(
    name="qwen2",
    rope_order=RopeOrder.NEOX,
    biases=SELF_ATTENTION | {"output"},
)


def describe(gguf: GGUFFile) -> Model:
    """The model in a file of this architecture; errors as `runtime.architectures.describe`."""
    return describe_family(gguf, FAMILY)
