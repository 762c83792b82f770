"""Phi 3 and 4: fused query-key-value and gate-up matrices, angle divisors for short and long sessions.

The sliding window in the metadata has no effect, as in llama.cpp.
"""

from offload.gguf import GGUFFile
from runtime.architectures.base import Model, RopeOrder
from runtime.architectures.describe import describe_family
from runtime.architectures.family import SELF_ATTENTION, Family

FAMILY = Family(
    name="phi3",
    rope_order=RopeOrder.NEOX,
    biases=SELF_ATTENTION,
    fused_gate_up=True,
    rope_tensors=("rope_factors_long", "rope_factors_short"),
)


def describe(gguf: GGUFFile) -> Model:
    """The model in a file of this architecture; errors as `runtime.architectures.describe`."""
    return describe_family(gguf, FAMILY)
