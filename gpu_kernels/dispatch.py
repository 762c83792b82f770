"""Which kernel multiplies how many columns, by quant type: a table, measured on the GPU or taken from its generation.

Ways: "few" (decodes in registers, float32 sums, 1 to 4 columns at a time), "many" (decodes in registers, matrix units),
"decoded" (decodes to float16 in memory, then torch's product), "torch" (types without a Triton kernel). A table can be
asked for what it chose and why. Knows nothing about models.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module, metadata, util

from gpu_kernels.decoding import DECODINGS
from gpu_kernels.kernels import Kernels
from gpu_kernels.tiles import GpuTraits, power_of_two

WAYS = ("few", "many", "decoded", "torch")
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # columns; a count is served by the next bucket
_LOG = logging.getLogger("strata.gpu")


@dataclass(frozen=True, slots=True)
class Dispatch:
    """`measured`: (quant type, bucket) -> way; what it does not hold is chosen by the GPU's generation."""

    gpu: GpuTraits
    measured: Mapping[tuple[str, int], str] = field(default_factory=dict)

    def way(self, quant_type: str, tokens: int) -> str:
        """How a product of `tokens` columns is computed."""
        if quant_type not in DECODINGS:
            return "torch"
        bucket = min(power_of_two(tokens), BUCKETS[-1])
        known = self.measured.get((quant_type, bucket))
        return known if known is not None else self._by_generation(bucket)

    def _by_generation(self, bucket: int) -> str:
        """Without matrix units in Triton's reach, torch's product with them wins earlier."""
        if bucket <= 4:
            return "few"
        return "many" if bucket <= (64 if self.gpu.has_matrix_units else 16) else "decoded"

    def describe(self, quant_type: str) -> str:
        """One line: the way of every bucket, and where it comes from."""
        ways = ", ".join(f"{bucket}: {self.way(quant_type, bucket)}" for bucket in BUCKETS)
        source = "measured" if any(name == quant_type for name, _ in self.measured) else f"sm_{self.gpu.capability}"
        return f"{quant_type} ({source}) {ways}"


def measured_dispatch(
    gpu: GpuTraits,
    quant_types: Sequence[str],
    seconds: Callable[[str, int, str], float],
    buckets: Sequence[int] = BUCKETS,
) -> Dispatch:
    """A table from measurements: `seconds(quant_type, columns, way)` of a product of the usual size, by any clock.

    "few" is not tried for many columns, nor "many" for one.
    """
    table = {}
    for quant_type in quant_types:
        if quant_type not in DECODINGS:
            continue
        for bucket in buckets:
            ways = [way for way in ("few", "many", "decoded") if _is_sensible(way, bucket)]
            table[quant_type, bucket] = min(ways, key=lambda way: seconds(quant_type, bucket, way))
    return Dispatch(gpu, table)


def _is_sensible(way: str, bucket: int) -> bool:
    return {"few": bucket <= 32, "many": bucket >= 2, "decoded": bucket >= 16}[way]


def why_no_triton() -> str | None:
    """Why Triton's kernels cannot be used here; None where they can."""
    if util.find_spec("triton") is None:
        return "Triton is not installed (it comes with torch's CUDA build on Linux)"
    triton = import_module("triton")  # here, because not every system has it
    if not hasattr(triton, "constexpr_function"):
        return f"Triton {metadata.version('triton')} is too old (3.5 is the first with what the kernels need)"
    return None


def kernels_for(torch_device: str, *, is_simulated: bool = False, quant_types: Sequence[str] = ()) -> Kernels:
    """The kernels for a torch device: Triton's on NVIDIA GPUs, else torch's, logged with the reason.

    Products with `quant_types` are timed to choose their ways (some seconds each, the first time, for compilation).
    """
    from gpu_kernels.torch_kernels import TorchKernels  # noqa: PLC0415  torch takes seconds to import

    if is_simulated or not torch_device.startswith("cuda"):
        return TorchKernels()
    reason = why_no_triton()
    if reason is not None:
        _LOG.warning("GPU kernels are torch's, which decode weights in memory: %s", reason)
        return TorchKernels()
    from gpu_kernels.triton_kernels import TritonKernels  # noqa: PLC0415  as above

    if not quant_types:
        return TritonKernels.on(torch_device)
    return TritonKernels(_measured_on(torch_device, quant_types))


def _measured_on(torch_device: str, quant_types: Sequence[str]) -> Dispatch:
    import torch  # noqa: PLC0415  as above

    from gpu_kernels.product_times import ProductTimes  # noqa: PLC0415  as above
    from gpu_kernels.triton_kernels import traits_of  # noqa: PLC0415  as above

    gpu = traits_of(torch_device)
    times = ProductTimes(torch.device(torch_device), gpu)
    dispatch = measured_dispatch(gpu, quant_types, times.seconds)
    for name in quant_types:
        _LOG.info("GPU products: %s", dispatch.describe(name))
    return dispatch
