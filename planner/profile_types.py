"""What a profile must know of the types of a model's weights, keys and values.

Knows nothing about how plans are found.
"""

from cpu_kernels.quant_types import quant_type
from planner.model_shape import ModelShape
from planner.plan import WeightsForm
from planner.profile import Profile, with_dequantize_rates, with_kernel_rates
from planner.profile_attention import with_attention_rates


def with_types(profile: Profile, shape: ModelShape, form: WeightsForm) -> Profile:
    """`profile` with what the form of the weights needs to be known of their types."""
    kinds = {quant_type(name) for name, _ in shape.weights_by_type}
    if form is WeightsForm.QUANTISED:
        return with_dequantize_rates(profile, kinds)
    if form is WeightsForm.PACKED:
        return with_attention_rates(with_kernel_rates(profile, kinds), shape.kv)
    return profile
