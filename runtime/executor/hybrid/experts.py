"""Routed experts that the GPU may compute: where they are, which are brought for a step, and what a step used.

Knows nothing about how experts are computed. Invariants: the places that a step computes with do not change while it
runs; who computes an expert never depends on anything but the routing, the places and the rates.
"""

import math
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.expert_split import LayerPlaces
from cpu_kernels.python_calls import PythonCall, PythonCalls
from cpu_kernels.reference.dequantize import dequantize
from cpu_kernels.waiting import HostCall
from gpu_kernels.device import GpuDevice
from gpu_kernels.matrix import GpuMatrix
from offload.cache_counts import CacheCounts
from offload.errors import StrataError, UnsupportedModelError
from offload.expert_rates import ExpertRates, ExpertTimes
from offload.expert_schedule import ExpertSplit, Flags, misses_to_move, moving_saves_s, schedule_experts
from offload.flash import FlashReader, ReadMode
from offload.gguf import GGUFFile, TensorInfo
from offload.gpu_slots import GpuSlots
from offload.policies import PolicyName
from offload.raw_experts import GGUFExperts
from offload.transfer import BUFFER_BYTES, TransferEngine
from runtime.architectures.base import Layer, Model
from runtime.executor.hybrid.finite_sums import FiniteSums
from runtime.executor.hybrid.placement import HybridPlacement
from runtime.finite import FiniteCheck
from runtime.streamed import StreamedWeights

BRINGING_GAIN = 0.9  # of the time without: what the CPU reads from flash stays in RAM, what is brought does not
EXPERT_TENSORS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


class GpuExperts:
    """The experts of the GPU's routed layers of `model`, read from `gguf`, which stays open."""

    def __init__(
        self,
        gguf: GGUFFile,
        model: Model,
        placement: HybridPlacement,
        device: GpuDevice,
        *,
        rates: ExpertRates | None = None,
        streamed: StreamedWeights | None = None,
        policy: PolicyName = PolicyName.LEAST_STALE,
    ) -> None:
        """Without `rates` no expert is brought for a step. `streamed`: where the CPU has its experts from, if not all
        are in RAM. Errors of `GpuSlots`, and `load` is to be called.
        """
        assert model.experts is not None, "only routed models have experts"
        layers = {layer.index: layer for layer in model.layers if _is_gpus(layer, placement)}
        tensors = {index: _tensors(layer) for index, layer in layers.items()}
        # whoever packs experts for the CPU looks at all of them; where that is done as they are read, so it is here
        source = GGUFExperts(tensors, look=None if streamed is None else FiniteCheck(gguf.path).rows)
        mode = ReadMode.BUFFERED if streamed is None else ReadMode.DIRECT
        reader = FlashReader(gguf.sources, most_bytes=source.most_bytes, mode=mode)
        self._engine = TransferEngine(device, buffer_bytes=min(BUFFER_BYTES, source.most_bytes))
        self._rates, self._streamed = rates, streamed
        self._resident = placement.resident
        self._calls = PythonCalls()
        self._bringer = ThreadPoolExecutor(1, "strata-bring")  # the CPU's own part of a layer need not wait for it
        self._bringing: list[Future[None]] = []
        self._brought = placement.brought_slots if rates is not None else 0
        self._used = model.experts.used_count
        self._fixed_tokens = 0
        self.learns = True  # whether experts that steps use get places for later ones
        try:
            self._slots = GpuSlots(
                *(source, reader, self._engine, device),
                layers=model.block_count,
                experts=model.experts.count,
                slots=placement.expert_slots,
                brought=self._brought,
                resident=placement.resident,
                seeds=placement.seeds,
                policy=policy,
            )
        except BaseException as error:
            self._engine.close()
            reader.close()
            if isinstance(error, NotImplementedError):
                raise UnsupportedModelError(
                    f"{gguf.path}: experts cannot be the GPU's: {error}", hint="run it with --gpu off"
                ) from error
            raise
        self._gguf, self._tensors = gguf, tensors
        self._sizes = {index: _size(stacked) for index, stacked in tensors.items()}
        self._counts = np.zeros((model.block_count, 2, model.experts.count), np.int64)
        self._where = np.zeros(model.experts.count, np.int32)
        self._stacks = self._stacks_now()

    @property
    def counts(self) -> CacheCounts:
        """Of experts that the GPU's layers used, how many were on the GPU."""
        return self._slots.counts

    def load(self, sums: FiniteSums) -> None:
        """Brings what is to be there at first. FlashError, or what the GPU raises.

        ModelFormatError naming a tensor with weights that are no numbers, of those that RAM does not hold.
        """
        self._slots.load()
        finite = FiniteCheck(self._gguf.path)
        for layer in sorted(self._resident):
            stacks, tensors, places = self._stacks[layer], self._tensors[layer], self._slots.table(layer)
            for expert, place in enumerate(places.tolist()):
                for stacked, tensor in zip(stacks, tensors, strict=True):
                    wrong = sums.rows_without(stacked.slot(place))
                    if len(wrong):
                        rows = self._gguf.read(tensor, expert).reshape(stacked.rows, stacked.row_bytes)[wrong]
                        with np.errstate(invalid="ignore", over="ignore"):
                            finite.values(tensor, dequantize(rows, tensor.quant_type))

    def stacks(self, layer: int) -> tuple[GpuMatrix, ...] | None:
        """Gate, up and down of a layer's places; None where it has none."""
        return self._stacks.get(layer)

    def places(self, layer: int) -> LayerPlaces:
        """What the row that shares a layer's experts out reads and writes."""
        table, counts = self._slots.table(layer), self._counts[layer]
        brought = self._slots.brought_from(layer) if layer in self._stacks else 0
        return LayerPlaces(table.ctypes.data, counts.ctypes.data, self._where.ctypes.data, brought)

    def is_resident(self, layer: int) -> bool:
        """Whether the GPU has all experts of a layer, and it alone."""
        return layer in self._resident

    def may_bring(self, layer: int, *, few: bool) -> bool:
        """Whether experts of a layer may be brought in steps of few tokens, or of many: the others ask nobody."""
        if not self._brought or layer in self._resident or layer not in self._stacks:
            return False
        if not few:
            return True
        if self._fixed_tokens:
            return False
        times = self._rates_now.times(*self._sizes[layer])
        if self._streamed is None:
            return moving_saves_s(self._used, times) > 0
        none = np.zeros(self._used, np.bool_)
        return bool(self._split(np.ones(self._used, np.int64), none, none, times).moved)

    def fix(self, tokens: int) -> None:
        """Before the first step: places keep the experts that they have, and steps of up to so many tokens bring none.

        Who computes an expert then depends on what was loaded alone, never on what ran before, nor on the tokens of
        such a step. Programs of steps that were made before are of no use any more.
        """
        self._fixed_tokens, self.learns = tokens, False

    def has(self, layer: int) -> NDArray[np.bool_]:
        """(experts,) those of a layer that are on the GPU between steps."""
        return np.asarray(self._slots.table(layer) >= 0)

    @property
    def num_places(self) -> int:
        """For experts that are kept."""
        return self._slots.places

    def shrink(self) -> int:
        """Between steps: gives up some places; returns bytes freed, 0 where there are none that could be.

        Programs and recordings of steps that were made before are of no use any more.
        """
        freed = self._slots.shrink()
        self._stacks = self._stacks_now()
        self._brought = min(self._brought, self._slots.brought)
        return freed

    def choose_call(self, layer: int, status: int, brought: HostCall) -> PythonCall:
        """The call in a layer's row; `brought` is called when what it brings is there."""
        return self._calls.callback(lambda _: self._choose(layer, brought), status)

    def take_failure(self) -> BaseException | None:
        """What a call in a row raised in the last step; asked for once."""
        return self._calls.take_failure()

    def step_over(self) -> None:
        """After a step that succeeded: learns from it. FlashError where an expert that it needed did not come."""
        failure = self._take_failure()
        if failure is not None:
            raise failure
        self._slots.used(self._counts[:, 0])
        if self.learns:
            self._slots.land()

    def fetch(self) -> None:
        """In the middle of a step, while the host waits for it: begins to fetch experts for later ones."""
        self._slots.fetch()

    def step_failed(self) -> StrataError | None:
        """After a step that did not succeed: nothing of it is still on its way. Why an expert did not come, if so."""
        failure = self._take_failure()
        self._engine.stream.synchronize()
        return failure

    def close(self) -> None:
        """Ends the reads and uploads; may be called twice."""
        self._bringer.shutdown()
        self._slots.close()
        self._engine.close()

    def _stacks_now(self) -> dict[int, tuple[GpuMatrix, ...]]:
        return {index: stacks for index in self._tensors if (stacks := self._slots.stacks_of(index)) is not None}

    def _choose(self, layer: int, brought: HostCall) -> None:
        """Decides who computes the experts that `_counts` tells of; see `ExpertSplit`."""
        counts = self._counts[layer, 0]
        used = np.flatnonzero(counts)
        there = self._where[used] >= 0
        tokens = counts[used]
        if tokens.sum() <= self._fixed_tokens * self._used:
            moved = used[:0]
        elif tokens.max() <= 1 and self._streamed is None:
            missing = used[~there]
            moved = missing[: self._moved_of(len(missing))]
        else:
            in_ram = None if self._streamed is None else self._streamed.has_slot(layer)[used]
            times = self._rates_now.times(*self._sizes[layer])
            split = self._split(tokens, there, in_ram, times)
            self._where[used[list(split.cpu)]] = -1
            moved = used[list(split.moved)]
        moved = moved[: self._brought]
        first = self._slots.brought_from(layer)
        self._where[moved] = np.arange(first, first + len(moved))
        self._bringing.append(self._bringer.submit(self._bring, layer, moved.tolist(), brought))

    def _bring(self, layer: int, experts: list[int], brought: HostCall) -> None:
        """Begins to bring experts; `brought` is called when they are there, or will not be."""
        try:
            self._slots.bring(layer, experts)
        finally:
            self._slots.call_when_brought(brought.address, brought.argument)

    def _take_failure(self) -> StrataError | None:
        """After a step: why an expert that was brought for it is not there; raises why one could not be asked for."""
        bringing, self._bringing = self._bringing, []
        wait(bringing)
        failure = self._slots.take_failure()
        for future in bringing:
            future.result()
        return failure

    def _split(self, tokens: NDArray[np.int64], there: Flags, in_ram: Flags | None, times: ExpertTimes) -> ExpertSplit:
        """Who computes a layer's experts; `in_ram`: those of them that RAM has, None where it has all."""
        split = schedule_experts(tokens, there, times, in_ram)
        if in_ram is None or not split.moved:
            return split
        kept = schedule_experts(tokens, there, replace(times, move_s=math.inf), in_ram)
        return split if split.makespan_s < BRINGING_GAIN * kept.makespan_s else kept

    def _moved_of(self, misses: int) -> int:
        rates = self._rates_now
        return misses_to_move(misses, rates.move_bytes_per_s, rates.cpu_bytes_per_s)

    @property
    def _rates_now(self) -> ExpertRates:
        assert self._rates is not None, "without rates nothing is brought"
        return self._rates


def has_gpu_experts(model: Model, placement: HybridPlacement) -> bool:
    """Whether the GPU has a routed layer."""
    return any(_is_gpus(layer, placement) for layer in model.layers)


def _is_gpus(layer: Layer, placement: HybridPlacement) -> bool:
    return layer.ffn_gate_inp is not None and layer.index in placement.feed_forward


def _tensors(layer: Layer) -> tuple[TensorInfo, ...]:
    return tuple(getattr(layer, name) for name in EXPERT_TENSORS)


def _size(tensors: tuple[TensorInfo, ...]) -> tuple[int, int]:
    """(bytes, weights) of one expert."""
    count = tensors[0].shape[0]
    return sum(tensor.num_bytes for tensor in tensors) // count, sum(tensor.num_elements for tensor in tensors) // count
