"""Which way products take on this machine's GPU, as it was measured: kept beside the profile, one document for a GPU.

A choice decides the last bits of sums, so the same is made every time; other software measures anew, as its kernels
may be others. Knows nothing about how products are timed.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from gpu_kernels.product_shape import ProductShape
from offload.gguf import GGUFFile
from offload.store_files import FILES, PARTIAL_SUFFIX, replace_file
from planner import document
from planner.folders import cache_folder

log = logging.getLogger("strata.planner.gpu_products")

SOFTWARE = ("strata", "torch", "triton")


@dataclass(frozen=True, slots=True)
class GpuProducts:
    """`ways`: by `ProductShape.key`."""

    gpu: str
    software: str
    ways: Mapping[str, str]


def shapes_of(gguf: GGUFFile) -> list[ProductShape]:
    """The matrices of all layers and of the output head, an expert's for each expert."""
    shapes = []
    for name, tensor in gguf.tensors.items():
        if tensor.quant_type.is_known and len(tensor.shape) > 1 and name.startswith(("blk.", "output.")):
            *stack, rows, columns = tensor.shape
            shapes += [ProductShape(tensor.quant_type.name, rows, columns)] * (stack[0] if stack else 1)
    return shapes


def known_ways(gpu: str, path: Path | None = None) -> dict[str, str]:
    """What was measured on the GPU of that name with this software; empty, and logged, where it cannot be read."""
    path = path or _path()
    if not path.is_file():
        return {}
    try:
        found = document.loads(GpuProducts, path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        log.warning("%s: what was measured of GPU products cannot be read: %s", path, error)
        return {}
    return dict(found.ways) if (found.gpu, found.software) == (gpu, _software()) else {}


def keep_ways(gpu: str, ways: Mapping[str, str], path: Path | None = None) -> None:
    """Stores them in place of what was known; a folder that cannot be written to is logged."""
    path = path or _path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = document.dumps(GpuProducts(gpu, _software(), dict(ways)))
        replace_file(FILES, path, text.encode(), path.with_name(path.name + PARTIAL_SUFFIX))
    except OSError as error:
        log.warning("%s: what was measured of GPU products cannot be kept: %s", path, error)


def describe(ways: Mapping[str, str]) -> str:
    """In a line: of every matrix the ways by columns."""
    shapes: dict[str, list[str]] = {}
    for key, way in ways.items():
        shape, _, columns = key.rpartition(" ")
        shapes.setdefault(shape, []).append(f"{columns}: {way}")
    return "; ".join(f"{shape} {', '.join(each)}" for shape, each in shapes.items())


def _path() -> Path:
    return cache_folder() / "gpu-products.json"


def _software() -> str:
    found = []
    for name in SOFTWARE:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)
