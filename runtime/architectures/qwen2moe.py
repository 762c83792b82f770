"""Qwen 1.5 MoE and Qwen 2 MoE: experts beside a shared one with a sigmoid gate.

The probabilities of the chosen experts are used as they are, without being made to sum to 1.
"""

from offload.gguf import GGUFFile
from runtime.architectures.base import Model, RopeOrder
from runtime.architectures.describe import describe_family
from runtime.architectures.family import SELF_ATTENTION, ExpertRule, Family

FAMILY = Family(
    name="qwen2moe",
    rope_order=RopeOrder.NEOX,
    biases=SELF_ATTENTION,
    experts=ExpertRule(required=True, weights_norm=False, shared=True, split_width=True),
    may_tie=False,
)


def describe(gguf: GGUFFile) -> Model:
    """The model in a file of this architecture; errors as `runtime.architectures.describe`."""
    return describe_family(gguf, FAMILY)
