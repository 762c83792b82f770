"""From a step's tasks to the CPU's part of it: a program with rows that wait for the GPU's part.

Knows nothing about what the GPU does in between, but what it leaves in the workspace.
"""

from collections.abc import Callable, Sequence

from cpu_kernels.program import Program
from offload.tiers import Device
from runtime.architectures.base import Layer
from runtime.executor.hybrid.handover import HostSide
from runtime.executor.hybrid.tasks import Task, Work
from runtime.executor.program.emitter import Emitter
from runtime.executor.program.lowering import Lowering
from runtime.executor.program.sequence_layout import SequenceLayout


class HostLowering:
    """Writes the program of `emitter`."""

    def __init__(
        self,
        emitter: Emitter,
        lowering: Lowering,
        side: HostSide,
        experts: Callable[[HostSide, Layer], None] | None,
        part_windows: frozenset[int | None],
    ) -> None:
        """`experts` adds the rows of a layer whose router is on the GPU; `part_windows` as in `StepShape`."""
        self._emitter, self._lowering, self._side, self._experts = emitter, lowering, side, experts
        self._part_windows = part_windows

    def step(self, tasks: Sequence[Task], layouts: Sequence[SequenceLayout], *, split: bool) -> Program:
        """The CPU's part of all tasks; layouts and `split` as in `Lowering.step`."""
        brought: set[int] = set()  # layers whose streamed matrices were asked for
        for task in tasks:
            if task.device is Device.CPU and task.layer is not None and task.layer.index not in brought:
                self._emitter.look_up_matrices(task.layer)
                brought.add(task.layer.index)
            if task.work is Work.MOVE:
                self._move(task.device)
            elif task.work is Work.SPLIT_ATTENTION:
                self._side.wait()
                self._lowering.attend(task.block, layouts, split=split)
                self._side.signal()
            elif task.work is Work.EXPERTS:
                assert self._experts is not None, "a model with such tasks has experts"
                self._experts(self._side, task.block)
            elif task.device is Device.CPU:
                self._do(task, layouts, split=split)
            elif task.work is Work.ATTENTION and task.block.sliding_window in self._part_windows:
                self._side.wait()
                self._lowering.attend_part(task.block, layouts, split=split)
                self._side.signal()
        return self._emitter.program

    def _move(self, device: Device) -> None:
        """The residual stream goes to the GPU, or comes here."""
        if device is Device.CPU:
            self._side.wait()
            return
        self._lowering.settle()
        self._side.signal()

    def _do(self, task: Task, layouts: Sequence[SequenceLayout], *, split: bool) -> None:
        if task.work is Work.ATTENTION:
            self._lowering.attention(task.block, layouts, split=split)
        elif task.work is Work.FEED_FORWARD:
            self._lowering.feed_forward(task.block)
        elif task.work is Work.OUTPUT:
            self._lowering.output()
