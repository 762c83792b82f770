"""BitNet b1.58: a norm before the output and the down projection, ternary matrices with a factor each.

The matrices hold -1, 0 and 1 with the factor in `.scale`, or the products. The gate is SiLU (not the squared ReLU of
the 2B model's report) and the output head the embedding, as llama.cpp has it for this name.
"""

from offload.gguf import GGUFFile
from runtime.architectures.base import Model, RopeOrder
from runtime.architectures.describe import describe_family
from runtime.architectures.family import Family

FAMILY = Family(
    name="bitnet",
    rope_order=RopeOrder.NEOX,
    may_untie=False,
    fused_qkv=False,
    sub_norms=True,
)


def describe(gguf: GGUFFile) -> Model:
    """The model in a file of this architecture; errors as `runtime.architectures.describe`."""
    return describe_family(gguf, FAMILY)
