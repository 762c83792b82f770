"""Which of the kernels chosen on this machine a model is run with: what a plan carries, and a store is packed for.

Knows nothing about what a choice means. A model whose bytes caches could hold is run with the usual kernels: choices
are measured on matrices that come from RAM. So is every model where `STRATA_ISA` forces a rung.
"""

from cpu_kernels.quant_types import quant_type
from cpu_kernels.tuning import Tuning
from offload.gguf import GGUFFile
from planner.model_shape import ModelShape
from planner.profile import Profile, load_or_measure, with_kernel_rates

TUNED_BYTES = 64 << 20


def chosen_kernels(profile: Profile, shape: ModelShape) -> Tuning | None:
    """The choices of a profile for a model's types; None for the usual kernels."""
    from cpu_kernels.isa import is_forced  # noqa: PLC0415 - brings a part of the compiler

    if profile.tuning is None or shape.num_bytes < TUNED_BYTES or is_forced():
        return None
    return profile.tuning.of(name for name, _ in shape.weights_by_type)


def measured_kernels(gguf: GGUFFile) -> Tuning | None:
    """`chosen_kernels` of an open model here, measured and stored where they are not known yet."""
    shape = ModelShape.from_gguf(gguf)
    if shape.num_bytes < TUNED_BYTES:
        return None
    return chosen_kernels(with_kernel_rates(load_or_measure(), map(quant_type, dict(shape.weights_by_type))), shape)
