"""OLMoE: queries and keys are normalised over the row of all heads; experts keep their probabilities."""

from offload.gguf import GGUFFile
from runtime.architectures.base import Model, QKNorm, RopeOrder
from runtime.architectures.describe import describe_family
from runtime.architectures.family import SELF_ATTENTION, ExpertRule, Family

FAMILY = Family(
    name="olmoe",
    rope_order=RopeOrder.NEOX,
    biases=SELF_ATTENTION,
    qk_norm=QKNorm.ROW,
    experts=ExpertRule(required=True, weights_norm=False, width_key=False),
    may_tie=False,
)


def describe(gguf: GGUFFile) -> Model:
    """The model in a file of this architecture; errors as `runtime.architectures.describe`."""
    return describe_family(gguf, FAMILY)
