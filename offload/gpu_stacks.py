"""Memory for experts on a GPU: stacks of matrices that layers of the same shapes and quant types share.

Knows nothing about files, nor about which expert is where.
"""

import logging
from collections.abc import Mapping, Sequence

import torch

from gpu_kernels.device import GpuDevice
from gpu_kernels.matrix import GpuMatrix
from offload.raw_experts import ExpertMatrix

log = logging.getLogger("strata.experts")

Matrices = tuple[ExpertMatrix, ...]


class ExpertStacks:
    """`places` for experts of `layers` that come and go, and `brought` places behind them for experts of one step."""

    def __init__(
        self, layers: Sequence[int], matrices: Matrices, *, places: int, brought: int, device: GpuDevice
    ) -> None:
        """torch.OutOfMemoryError where the device has no room; NotImplementedError for a type that it cannot hold."""
        self.layers, self._kinds = tuple(layers), matrices
        self.places, self.brought = places, brought
        self.free = list(range(places - 1, -1, -1))
        self.matrices = tuple(
            GpuMatrix.allocate(
                matrix.quant_type, matrix.rows, matrix.columns, slots=places + brought, empty=device.empty
            )
            for matrix in matrices
        )

    def smaller(self, device: GpuDevice) -> "ExpertStacks | None":
        """Stacks in place of these, whose memory is freed first: a quarter fewer places, or if there were none without
        those of one step. None where nothing is left, or the device has no room for what is.
        """
        for matrix in self.matrices:
            for plane in matrix.planes:
                device.free(plane)
        places, brought = self.places * 3 // 4, self.brought if self.places else 0
        if not places + brought:
            return None
        try:
            return ExpertStacks(self.layers, self._kinds, places=places, brought=brought, device=device)
        except torch.OutOfMemoryError as error:
            log.warning("the GPU keeps no experts of layers %s: %s", ", ".join(map(str, self.layers)), str(error))
            return None

    @property
    def num_bytes(self) -> int:
        """Of all places."""
        return sum(matrix.num_bytes for matrix in self.matrices)


def make_stacks(
    layers: Mapping[int, Matrices],
    wanted: Mapping[int, int],
    slots: int,
    *,
    experts: int,
    brought: int,
    device: GpuDevice,
) -> tuple[ExpertStacks, ...]:
    """Stacks for layers with these matrices, with `slots` places together.

    `wanted`: experts by layer that get a place anyway. What is left is shared by how many of the layers' experts have
    none, so that no stacks have more places than experts.
    """
    alike: dict[Matrices, list[int]] = {}
    for layer, matrices in sorted(layers.items()):
        alike.setdefault(matrices, []).append(layer)
    rest = max(slots - sum(wanted.values()), 0)
    lacking = experts * len(layers) - sum(wanted.values())
    stacks = []
    for matrices, group in alike.items():
        own = sum(wanted.get(layer, 0) for layer in group)
        own_lacking = experts * len(group) - own
        share = min(-(-rest * own_lacking // max(lacking, 1)), own_lacking, rest)
        rest, lacking = rest - share, lacking - own_lacking
        if own + share + brought:
            stacks.append(ExpertStacks(group, matrices, places=own + share, brought=brought, device=device))
    return tuple(stacks)
