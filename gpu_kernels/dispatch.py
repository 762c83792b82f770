"""Which kernel multiplies how many columns, by quant type: a table, measured on the GPU or taken from its generation.

Ways: "few" (decodes in registers, float32 sums, 1 to 4 columns at a time), "many" (decodes in registers, matrix units),
"decoded" (decodes to float16 in memory, then torch's product), "torch" (types without a Triton kernel). The way of a
step of up to `STEP_COLUMNS` columns is one, however many there are: it decides the last bits of a sum. A table can be
asked for what it chose and why. Knows nothing about models.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module, metadata, util

from gpu_kernels.decoding import DECODINGS
from gpu_kernels.kernels import Kernels
from gpu_kernels.product_shape import ProductShape
from gpu_kernels.tiles import STEP_COLUMNS, GpuTraits, power_of_two

WAYS = ("few", "many", "decoded", "torch")
BUCKETS = (STEP_COLUMNS, 64, 128, 256, 512)  # columns; a count is served by the next bucket
STEP_SAMPLES = {1: 1.0, 8: 0.25}  # what of a step is timed, and its weight: a pass of 8 drafts yields about four tokens
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
        bucket = min(max(power_of_two(tokens), BUCKETS[0]), BUCKETS[-1])
        known = self.measured.get((quant_type, bucket))
        return known if known is not None else self._by_generation(bucket)

    def _by_generation(self, bucket: int) -> str:
        """Without matrix units in Triton's reach, torch's product with them wins earlier."""
        if bucket <= STEP_COLUMNS:
            return "few"
        return "many" if bucket <= 64 and self.gpu.has_matrix_units else "decoded"

    def describe(self, quant_type: str) -> str:
        """One line: the way of every bucket, and where it comes from."""
        ways = ", ".join(f"{bucket}: {self.way(quant_type, bucket)}" for bucket in BUCKETS)
        source = "measured" if any(name == quant_type for name, _ in self.measured) else f"sm_{self.gpu.capability}"
        return f"{quant_type} ({source}) {ways}"


def weightiest(shapes: Iterable[ProductShape]) -> list[ProductShape]:
    """For every type with a kernel the shape that most of its weights have."""
    weights: Counter[ProductShape] = Counter()
    for shape in shapes:
        weights[shape] += shape.rows * shape.columns
    found: dict[str, ProductShape] = {}
    for shape, _ in weights.most_common():
        if shape.quant_type in DECODINGS:
            found.setdefault(shape.quant_type, shape)
    return list(found.values())


def measured_ways(
    shapes: Iterable[ProductShape], seconds: Callable[[ProductShape, int, str], float], known: Mapping[str, str]
) -> dict[str, str]:
    """The quickest way of every shape and bucket, by `ProductShape.key`; what is `known` is not measured again.

    `seconds(shape, columns, way)` of a product, by any clock. "few" is for steps alone, "decoded" for prompts.
    """
    ways = {}
    for shape in shapes:
        for bucket in BUCKETS:
            is_step = bucket <= STEP_COLUMNS
            key, samples = shape.key(bucket), STEP_SAMPLES if is_step else {bucket: 1.0}

            def cost(way: str, shape: ProductShape = shape, samples: Mapping[int, float] = samples) -> float:
                return sum(weight * seconds(shape, count, way) for count, weight in samples.items())

            ways[key] = (
                known[key] if key in known else min(("few", "many") if is_step else ("many", "decoded"), key=cost)
            )
    return ways


def dispatch_of(gpu: GpuTraits, shapes: Iterable[ProductShape], ways: Mapping[str, str]) -> Dispatch:
    """The table of `measured_ways`; ValueError for a way that there is not."""
    table = {(shape.quant_type, bucket): ways[shape.key(bucket)] for shape in shapes for bucket in BUCKETS}
    if unknown := set(table.values()) - set(WAYS):
        raise ValueError(f"no ways of products: {', '.join(sorted(unknown))}")
    return Dispatch(gpu, table)


def why_no_triton() -> str | None:
    """Why Triton's kernels cannot be used here; None where they can."""
    if util.find_spec("triton") is None:
        return "Triton is not installed (it comes with torch's CUDA build on Linux)"
    triton = import_module("triton")  # here, because not every system has it
    if not hasattr(triton, "constexpr_function"):
        return f"Triton {metadata.version('triton')} is too old (3.5 is the first with what the kernels need)"
    return None


@dataclass(frozen=True, slots=True)
class Measured:
    """What products to choose ways for by measurement, and what is known: `ways` by `ProductShape.key`, added to."""

    shapes: Sequence[ProductShape]
    ways: dict[str, str]


def kernels_for(torch_device: str, *, is_simulated: bool = False, measured: Measured | None = None) -> Kernels:
    """The kernels for a torch device: Triton's on NVIDIA GPUs, else torch's, logged with the reason.

    With `measured` products whose ways are not known are timed (some seconds each, the first time, for compilation).
    """
    from gpu_kernels.torch_kernels import TorchKernels  # noqa: PLC0415  torch takes seconds to import

    if is_simulated or not torch_device.startswith("cuda"):
        return TorchKernels()
    reason = why_no_triton()
    if reason is not None:
        _LOG.warning("GPU kernels are torch's, which decode weights in memory: %s", reason)
        return TorchKernels()
    from gpu_kernels.triton_kernels import TritonKernels  # noqa: PLC0415  as above

    if measured is None:
        return TritonKernels.on(torch_device)
    return TritonKernels(_measured_on(torch_device, measured))


def _measured_on(torch_device: str, measured: Measured) -> Dispatch:
    import torch  # noqa: PLC0415  as above

    from gpu_kernels.product_times import ProductTimes  # noqa: PLC0415  as above
    from gpu_kernels.triton_kernels import traits_of  # noqa: PLC0415  as above

    gpu, shapes = traits_of(torch_device), weightiest(measured.shapes)
    times = ProductTimes(torch.device(torch_device), gpu)

    def seconds(shape: ProductShape, columns: int, way: str) -> float:
        times.rows, times.columns = shape.rows, shape.columns
        return times.seconds(shape.quant_type, columns, way)

    try:
        measured.ways.update(measured_ways(shapes, seconds, measured.ways))
    except torch.OutOfMemoryError as error:
        _LOG.warning("GPU products are not measured, as there is too little memory: %s", error)
        return Dispatch(gpu)
    finally:
        times.forget()
        torch.cuda.empty_cache()
    dispatch = dispatch_of(gpu, shapes, measured.ways)
    for shape in shapes:
        _LOG.info("GPU products: %s", dispatch.describe(shape.quant_type))
    return dispatch
