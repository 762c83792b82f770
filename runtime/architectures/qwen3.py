"""Qwen 3, dense: queries and keys are normalised head by head."""

from offload.gguf import GGUFFile
from runtime.architectures.base import Model, QKNorm, RopeOrder
from runtime.architectures.describe import describe_family
from runtime.architectures.family import SELF_ATTENTION, Family

FAMILY = Family(
    name="qwen3",
    rope_order=RopeOrder.NEOX,
    biases=SELF_ATTENTION,
    qk_norm=QKNorm.HEAD,
)


def describe(gguf: GGUFFile) -> Model:
    """The model in a file of this architecture; errors as `runtime.architectures.describe`."""
    return describe_family(gguf, FAMILY)
