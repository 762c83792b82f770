"""A file of raw Q8_0 experts whose bytes tell whose they are, and a GPU cache of them on a simulated GPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from cpu_kernels.quant_types import QUANT_TYPES
from gpu_kernels.matrix import GpuMatrix, arrange
from gpu_kernels.simulated import SimulatedDevice
from offload.flash import FlashReader, ReadMode
from offload.gguf_source import ByteSource
from offload.gguf_tensors import TensorInfo
from offload.gpu_slots import GpuSlots, Key
from offload.policies import PolicyName
from offload.raw_experts import GGUFExperts, Look
from offload.transfer import TransferEngine

LAYERS, EXPERTS = 4, 6
HIDDEN, INNER = 32, 64
DENSE_LAYER = 1  # without experts
MATRICES = (("gate", INNER, HIDDEN), ("up", INNER, HIDDEN), ("down", HIDDEN, INNER))
Q8_0 = next(kind for kind in QUANT_TYPES.values() if kind.name == "Q8_0")


class RawExpertsFile:
    """Random bytes, and the tensors that stack them; the last layer has another shape."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[int, list[TensorInfo]] = {}
        data = np.random.default_rng(5).integers(0, 256, 1 << 20, np.uint8)
        offset = 100
        for layer in (layer for layer in range(LAYERS) if layer != DENSE_LAYER):
            for name, rows, columns in MATRICES:
                rows_here = rows if layer < LAYERS - 1 else 2 * rows
                num_bytes = EXPERTS * rows_here * columns // 32 * 34
                tensor = TensorInfo(
                    f"blk.{layer}.ffn_{name}_exps.weight", Q8_0, (EXPERTS, rows_here, columns), 0, offset, num_bytes
                )
                self.tensors.setdefault(layer, []).append(tensor)
                offset += num_bytes
        self.data = data[:offset]
        path.write_bytes(self.data.tobytes())

    def raw(self, layer: int, part: int, expert: int) -> NDArray[np.uint8]:
        """(rows, bytes of a row)."""
        tensor = self.tensors[layer][part]
        offset, num_bytes = tensor.expert_slice(expert)
        return self.data[offset : offset + num_bytes].reshape(tensor.shape[1], -1)


class SlotsOnSimulatedGpu:
    """`GpuSlots` with everything that they need; one reading thread, so that reads come in order."""

    def __init__(
        self,
        file: RawExpertsFile,
        *,
        slots: int,
        brought: int = 0,
        resident: frozenset[int] = frozenset(),
        seeds: Sequence[Key] = (),
        policy: PolicyName = PolicyName.LFU,
        look: Look | None = None,
        spec: str = "sim:vram=8MiB,bw=100GB/s,link=10GB/s,tflops=1,launch=0us,link_latency=0us",
    ) -> None:
        self.file = file
        self.device = SimulatedDevice(spec)
        self.engine = TransferEngine(self.device, buffers=2, buffer_bytes=4096)
        self.bytes_source = ByteSource(file.path)
        source = GGUFExperts(file.tensors, look=look, read_bytes=1500)
        reader = FlashReader([self.bytes_source], most_bytes=source.most_bytes, mode=ReadMode.BUFFERED, depth=1)
        self.slots = GpuSlots(
            source,
            reader,
            self.engine,
            self.device,
            layers=LAYERS,
            experts=EXPERTS,
            slots=slots,
            brought=brought,
            resident=resident,
            seeds=seeds,
            policy=policy,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.slots.close()
        self.engine.close()
        self.device.close()
        self.bytes_source.close()

    def resident(self) -> set[Key]:
        """What the tables say."""
        tables = np.array([self.slots.table(layer) for layer in range(LAYERS)])
        return {(int(layer), int(expert)) for layer, expert in np.argwhere(tables >= 0)}

    def is_whole(self, layer: int, expert: int, place: int) -> bool:
        """Whether all matrices of an expert lie in this place."""
        return all(
            same(stack.slot(place), arrange(torch.from_numpy(self.file.raw(layer, part, expert).copy()), "Q8_0"))
            for part, stack in enumerate(self.slots.stacks(layer))
        )

    def check(self) -> None:
        """Everything that a table names is there, and no place is named twice."""
        named: set[tuple[int, int]] = set()
        for layer, expert in self.resident():
            place = int(self.slots.table(layer)[expert])
            assert place < self.slots.brought_from(layer)
            assert self.is_whole(layer, expert, place)
            named.add((id(self.slots.stacks(layer)), place))
        assert len(named) == len(self.resident())


def same(matrix: GpuMatrix, other: GpuMatrix) -> bool:
    """Bytes for bytes."""
    pairs = zip(matrix.planes, other.planes, strict=True)
    return all(torch.equal(plane.view(torch.uint8), wanted.view(torch.uint8)) for plane, wanted in pairs)
