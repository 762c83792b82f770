"""Llama 1 to 3, Mistral, SmolLM, TinyLlama, and Mixtral (with experts): the architecture `llama`.

Rotary pairs are neighbours, since converters reorder the rows of attn_q and attn_k. Chosen experts' weights sum to 1.
A sliding window in the metadata (Mistral 7B v0.1) has no effect, as in llama.cpp.
"""

from offload.gguf import GGUFFile
from runtime.architectures.base import Model, RopeOrder
from runtime.architectures.describe import describe_family
from runtime.architectures.family import SELF_ATTENTION, ExpertRule, Family

FAMILY = Family(
    name="llama",
    rope_order=RopeOrder.NORM,
    biases=SELF_ATTENTION | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"},
    experts=ExpertRule(required=False, weights_norm=True, width_key=False),
    rope_tensors=("rope_freqs", "rope_factors_long", "rope_factors_short"),
)


def describe(gguf: GGUFFile) -> Model:
    """The model in a file of this architecture; errors as `runtime.architectures.describe`."""
    return describe_family(gguf, FAMILY)
