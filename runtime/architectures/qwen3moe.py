"""Qwen 3 with experts: as `qwen3`, and the weights of the chosen experts sum to 1."""

from offload.gguf import GGUFFile
from runtime.architectures.base import Model, QKNorm, RopeOrder
from runtime.architectures.describe import describe_family
from runtime.architectures.family import SELF_ATTENTION, ExpertRule, Family

FAMILY = Family(
    name="qwen3moe",
    rope_order=RopeOrder.NEOX,
    biases=SELF_ATTENTION,
    qk_norm=QKNorm.HEAD,
    experts=ExpertRule(required=True, weights_norm=True, split_width=True),
)


def describe(gguf: GGUFFile) -> Model:
    """The model in a file of this architecture; errors as `runtime.architectures.describe`."""
    return describe_family(gguf, FAMILY)
