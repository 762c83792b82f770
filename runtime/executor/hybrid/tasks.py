"""What a step does in which order, and on which device: the one list that both sides of a hybrid step follow.

Knows nothing about how a task is done. Invariant: between two tasks the residual stream is on one device, and before
every task that the other device begins there is a MOVE.
"""

from dataclasses import dataclass
from enum import Enum

from offload.tiers import Device
from runtime.architectures.base import Layer, Model
from runtime.bundles import is_vector
from runtime.executor.hybrid.placement import HybridPlacement


class Work(Enum):
    """Kinds of tasks. MOVE: the residual stream goes to the device.

    SPLIT_ATTENTION: the GPU's products, the CPU's cache. EXPERTS: the GPU's routed layer, whose experts both compute.
    """

    MOVE = "move"
    ATTENTION = "attention"
    SPLIT_ATTENTION = "split attention"
    FEED_FORWARD = "feed forward"
    EXPERTS = "experts"
    OUTPUT = "output"


@dataclass(frozen=True, slots=True)
class Task:
    """`layer` is None for MOVE and OUTPUT; `device` of a task that both take part in is the GPU."""

    work: Work
    device: Device
    layer: Layer | None = None

    @property
    def block(self) -> Layer:
        """The layer of a task that has one."""
        assert self.layer is not None, "tasks of layers have one"
        return self.layer


def tasks_of(model: Model, placement: HybridPlacement) -> tuple[Task, ...]:
    """A step that begins with embeddings on the CPU and ends with logits where the output head is."""
    tasks: list[Task] = []
    for layer in model.layers:
        device = _device(layer.index in placement.attention)
        work = Work.SPLIT_ATTENTION if layer.index in placement.ram_kv else Work.ATTENTION
        tasks.append(Task(work, device, layer))
        device = _device(layer.index in placement.feed_forward)
        is_shared_out = device is Device.GPU and layer.ffn_gate_inp is not None
        tasks.append(Task(Work.EXPERTS if is_shared_out else Work.FEED_FORWARD, device, layer))
    tasks.append(Task(Work.OUTPUT, _device(placement.output)))
    result: list[Task] = []
    holder = Device.CPU
    for task in tasks:
        if task.device is not holder:
            holder = task.device
            result.append(Task(Work.MOVE, holder))
        result.append(task)
    return tuple(result)


def gpu_matrices(model: Model, placement: HybridPlacement) -> frozenset[str]:
    """Names of the matrices that the GPU multiplies with, routed experts left out."""
    names = set()
    for layer in model.layers:
        for name, tensor in layer.tensors():
            part = placement.attention if name.startswith("attn_") else placement.feed_forward
            if layer.index in part and not is_vector(name) and not name.endswith("_exps"):
                names.add(tensor.name)
    return frozenset(names | {model.output.name} if placement.output else names)


def resident_matrices(model: Model, placement: HybridPlacement) -> frozenset[str]:
    """Names of the stacked experts that RAM does not hold."""
    return frozenset(
        tensor.name
        for layer in model.layers
        if layer.index in placement.resident
        for name, tensor in layer.tensors()
        if name.endswith("_exps")
    )


def _device(on_gpu: bool) -> Device:
    return Device.GPU if on_gpu else Device.CPU
