"""Runs of a hybrid step: a thread goes through the CPU's program while the GPU's part is given to its stream.

Knows nothing about what to do when the GPU is full. Invariant: when a run is over, whether it failed or not, neither
side is doing anything.
"""

import logging
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from cpu_kernels.pool import Pool
from cpu_kernels.program import Program
from gpu_kernels.device import GpuDevice, Stream
from gpu_kernels.kernels import Kernels
from offload.errors import DeviceError, StrataError
from offload.routing_trace import TraceRecorder
from runtime.architectures.base import Model
from runtime.executor.hybrid.angles import GpuAngles
from runtime.executor.hybrid.buffers import GpuBuffers, pinned_workspace
from runtime.executor.hybrid.experts import GpuExperts
from runtime.executor.hybrid.gpu_experts import ExpertLowering, ExpertTables
from runtime.executor.hybrid.gpu_head import GpuHead
from runtime.executor.hybrid.gpu_lowering import GpuLowering
from runtime.executor.hybrid.gpu_model import GpuModel
from runtime.executor.hybrid.handover import Handover
from runtime.executor.hybrid.host_experts import HostExperts
from runtime.executor.hybrid.host_lowering import HostLowering
from runtime.executor.hybrid.kv_parts import cache_of, windows_into_ram
from runtime.executor.hybrid.kv_pool import KVPool, blocks_of
from runtime.executor.hybrid.placement import HybridPlacement
from runtime.executor.hybrid.recording import Recording
from runtime.executor.hybrid.step_graphs import StepGraphs
from runtime.executor.hybrid.step_inputs import StepInputs, StepShape
from runtime.executor.hybrid.tasks import tasks_of
from runtime.executor.hybrid.weights import GpuWeights
from runtime.executor.program.cold_plan import ColdPlan
from runtime.executor.program.kv_cold import ColdReads
from runtime.executor.program.kv_tiers import KVTiers
from runtime.executor.program.lanes import Lane
from runtime.executor.program.lowering import Lowering, part_matrix
from runtime.executor.program.parameters import Name
from runtime.executor.program.programs import Settable
from runtime.executor.program.runner import LOGITS_TOKENS, Runner
from runtime.executor.program.sequence_layout import SequenceLayout
from runtime.panels import PanelWeights

log = logging.getLogger("strata.hybrid")

MAX_RECORDINGS = 32
SPIN_S = 500e-6  # that the host waits awake for the GPU, whose part of a layer is that short; to be woken takes 50 us
CONTEXT_STEP = 256  # tokens of context that a recording's costs are for


class HybridRunner(Runner):
    """Runs steps of `model` by `placement`; `gpu_weights` are loaded. Otherwise as `Runner`."""

    def __init__(
        self,
        model: Model,
        weights: PanelWeights,
        threads: int,
        chunk_tokens: int,
        *,
        placement: HybridPlacement,
        device: GpuDevice,
        stream: Stream,
        kernels: Kernels,
        gpu_weights: GpuWeights,
        pool: KVPool,
        experts: GpuExperts | None,
        kv_tiers: KVTiers | None = None,
    ) -> None:
        self._device, self._stream = device, stream
        super().__init__(model, weights, threads, chunk_tokens, pinned_workspace(device), kv_tiers)
        buffers = GpuBuffers(device, self._workspace, self._chunk_tokens)
        angles = GpuAngles(self._angles, device, stream)
        self._gpu = GpuModel(model, gpu_weights, buffers, pool, angles, kernels)
        self._head_of_gpu = GpuHead(self._gpu, stream)
        self._handover = Handover()
        self._experts = experts
        self._graphs = StepGraphs(stream)
        self._recordings: OrderedDict[StepShape, tuple[Recording, StepInputs]] = OrderedDict()
        self._generation = (0, 0)
        self._part_windows: frozenset[int | None] = frozenset()  # of the step, see `StepShape`
        self._beside = ThreadPoolExecutor(1, "strata-program")
        self.placement = placement
        self._tasks = tasks_of(model, placement)

    def use_placement(self, placement: HybridPlacement) -> None:
        """From the next run on; what the GPU has weights for stays."""
        self.placement = placement
        self._tasks = tasks_of(self._model, placement)
        self._programs.clear()
        self._recordings.clear()

    def shrink(self, chunk_tokens: int) -> None:
        """Frees the GPU's activations; those of at most `chunk_tokens` tokens are made anew when needed."""
        self._recordings.clear()
        self._head_of_gpu.forget()
        self._gpu.buffers.release(chunk_tokens)

    @property
    def gpu(self) -> GpuModel:
        """What lies on the GPU."""
        return self._gpu

    def features(self, tokens: int) -> NDArray[np.float32]:
        """See `Runner`."""
        if self.placement.output:
            here, there = self._gpu.buffers.shared("normed", self._ran_tokens, self._model.embedding_length)
            self._stream.copy(there, here)
            self._stream.synchronize()
        return super().features(tokens)

    def close(self) -> None:
        """See `Runner`."""
        self._beside.shutdown()
        self._recordings.clear()
        super().close()

    def record(self, recorder: TraceRecorder) -> None:
        """See `Runner`."""
        super().record(recorder)
        self._recordings.clear()

    def _new_pool(self, threads: int) -> Pool:
        """Away from what simulates a GPU; where there are too few CPUs for that, waiting must leave them to it."""
        cpus = self._device.host_cpus
        if self._device.is_simulated and (cpus is None or threads > len(cpus)):
            return Pool(threads)
        return Pool(threads, cpus=cpus, spin_s=SPIN_S)

    def _new_program(
        self, layouts: tuple[SequenceLayout, ...], *, split: bool, foresees: bool, cold: ColdReads | None
    ) -> Program:
        """`foresees` is of no use: which experts the GPU will compute is not known."""
        emitter = self._emitter()
        side = self._handover.host_side(emitter.program)
        routed = None
        if self._experts is not None:
            host = HostExperts(emitter, self._experts, self._tables(), self._handover.tell_brought)
            routed = partial(host.add, few=split)
        lowering = HostLowering(emitter, Lowering(emitter, LOGITS_TOKENS, cold), side, routed, self._part_windows)
        return lowering.step(self._tasks, layouts, split=split)

    def _run_lanes(self, lanes: Sequence[Lane], logits_tokens: int, plan: ColdPlan | None) -> NDArray[np.float32]:
        self._part_windows = windows_into_ram(self._model, self._gpu.pool.layers, lanes)
        self._variant = self._part_windows
        return super()._run_lanes(lanes, logits_tokens, plan)

    def _set_lanes(self, program: Settable, lanes: Sequence[Lane]) -> None:
        super()._set_lanes(program, lanes)
        part, row = part_matrix(self._model, self._workspace, self._chunk_tokens), 0
        for number, lane in enumerate(lanes):
            program.set(Name.PART.of(number), part.address + row * part.stride_bytes)
            program.set(Name.PART_PIECES.of(number), cache_of(lane).ram_pieces)
            row += len(lane.token_ids)

    def _tables(self) -> ExpertTables:
        assert self._model.experts is not None, "only routed models have tables"
        place = (self._workspace, self._chunk_tokens, self._model.experts)
        return ExpertTables(*place, keeps_routing=self._recorder is not None)

    def _step(self, program: Settable, lanes: Sequence[Lane], first_wanted: int, wanted: int) -> None:
        recording, shape = self._recording(lanes)
        do = partial(self._do, recording, program, first_wanted, wanted)
        if wanted and self._recorder is None and self._graphs.wants(recording, shape):
            embedded = self._x[: shape.tokens].copy()

            def do_anew() -> None:
                self._x[: shape.tokens] = embedded
                self._cold.begin(lanes)  # what was read is gone when a step is over
                do()

            self._graphs.try_one(recording, do_anew, self._logits[:wanted])
        else:
            do()
        if self._experts is not None:
            self._experts.step_over()

    def _do(self, recording: Recording, program: Settable, first_wanted: int, wanted: int) -> None:
        """The parts of both devices, once."""
        self._handover.reset()
        running = self._beside.submit(self._run_program, program, first_wanted, wanted)
        try:
            self._handover.begun.wait(1)
        except ValueError:  # it did not
            running.result()
            raise
        try:
            recording.replay()
            if self.placement.output and wanted:
                self._head_of_gpu.compute(first_wanted, wanted)
            if self._experts is not None:
                self._experts.fetch()
            self._stream.synchronize()
            running.result()
        except BaseException as error:
            failure = self._abandon(running)
            raise self._told(failure or error) from error

    def _more_logits(self, first_wanted: int, wanted: int) -> None:
        if not self.placement.output:
            super()._more_logits(first_wanted, wanted)
            return
        try:
            self._head_of_gpu.compute(first_wanted, wanted)
            self._stream.synchronize()
        except Exception as error:
            raise self._told(error) from error

    def _run_program(self, program: Settable, first_wanted: int, wanted: int) -> None:
        """In a thread beside the one that gives the GPU its work."""
        try:
            self._run(program, first_wanted, wanted)
        except BaseException as error:
            self._handover.fail()
            failure = None if self._experts is None else self._experts.take_failure()
            if failure is not None:
                raise failure from error
            raise

    def _abandon(self, running: "Future[None]") -> StrataError | None:
        """Ends what is left of a step that failed; why an expert was not brought, if that was the cause."""
        self._handover.fail()
        error = running.exception()
        if error is not None:
            log.debug("the program of a step that failed ended with: %s", error)
        try:
            self._stream.synchronize()
            return None if self._experts is None else self._experts.step_failed()
        except Exception as later:  # noqa: BLE001 - the first error is raised
            log.warning("after a step that failed: %s", later)
            return None

    def _told(self, error: BaseException) -> BaseException:
        """The error as it is to be raised."""
        if isinstance(error, torch.OutOfMemoryError | StrataError) or not isinstance(error, Exception):
            return error
        return DeviceError(f"{self._device.name} failed: {error}", hint="run it with --gpu off")

    def _recording(self, lanes: Sequence[Lane]) -> tuple[Recording, StepShape]:
        """The GPU's part of a step, its inputs filled in, and its shape. torch.OutOfMemoryError if the GPU is full."""
        caches = [cache_of(lane) for lane in lanes]
        capacity = max(kv.capacity_tokens for kv in caches)
        gpu = self._gpu
        if gpu.pool.layers:
            for kv, lane in zip(caches, lanes, strict=True):
                gpu.angles.reach(kv.capacity_tokens, lane.stop)
        generation = gpu.pool.generation, gpu.angles.generation
        if generation != self._generation:
            self._recordings.clear()
            self._generation = generation
        shape = StepShape(
            tokens=sum(len(lane.token_ids) for lane in lanes),
            lanes=len(lanes),
            blocks=1 << (blocks_of(capacity) - 1).bit_length(),
            context=self._costed_context(lanes),
            capacity_tokens=capacity,
            is_apart=any(kv.ram_pieces for kv in caches),
            part_windows=self._part_windows,
        )
        if shape not in self._recordings:
            self._recordings[shape] = self._recorded(shape)
            if len(self._recordings) > MAX_RECORDINGS:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(shape)
        recording, inputs = self._recordings[shape]
        inputs.fill([lane.start for lane in lanes], caches)
        return recording, shape

    def _costed_context(self, lanes: Sequence[Lane]) -> int:
        """Tokens of context on the GPU as far as costs are concerned, which only a simulated one looks at."""
        if not self._device.is_simulated:
            return 0
        held = sum(lane.stop - cache_of(lane).ram_tokens for lane in lanes)
        return -(-held // CONTEXT_STEP) * CONTEXT_STEP

    def _recorded(self, shape: StepShape) -> tuple[Recording, StepInputs]:
        recording, inputs = Recording(self._stream), StepInputs(self._device, shape)
        lowering = GpuLowering(self._gpu, shape, inputs, recording, self._handover.gpu_side(recording))
        routed = None
        if self._experts is not None:
            few = shape.lanes > 1 or shape.tokens <= self.few_tokens
            routed = partial(ExpertLowering(lowering, self._experts, self._tables()).layer, few=few)
        lowering.step(self._tasks, routed)
        return recording, inputs
