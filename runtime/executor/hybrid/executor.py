"""Runs a model on a GPU and the CPU together, each its parts, by a placement that does not change while all is well.

Where the GPU's memory does not suffice in the middle of a run, prompts go in smaller chunks, then slots for experts are
given up, then the oldest keys and values move to RAM, then all those of layers; this is logged. What RAM has no room
for then goes on to flash. Knows nothing about how a placement is found. Invariants: as for `ProgramExecutor`, as far as
the GPU's kernels give a token the same bits whatever is computed beside it.
"""

import logging
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray

from cpu_kernels.isa import ISA
from cpu_kernels.kv_layout import PIECE_TOKENS
from cpu_kernels.kv_policy import KVPolicy
from cpu_kernels.tuning import Tuning
from gpu_kernels.device import GpuDevice
from gpu_kernels.dispatch import kernels_for
from gpu_kernels.kernels import Kernels
from offload.cache_counts import CacheCounts
from offload.errors import DeviceError
from offload.expert_rates import ExpertRates
from offload.gguf import GGUFFile
from runtime.architectures.base import Model
from runtime.executor.hybrid.angles import factors_of
from runtime.executor.hybrid.experts import GpuExperts, has_gpu_experts
from runtime.executor.hybrid.finite_sums import FiniteSums
from runtime.executor.hybrid.kv import HybridKV, bring_all_to_ram
from runtime.executor.hybrid.kv_pool import KVPool
from runtime.executor.hybrid.loading import Progress, load_both, no_room
from runtime.executor.hybrid.placement import HybridPlacement
from runtime.executor.hybrid.runner import HybridRunner
from runtime.executor.hybrid.tasks import gpu_matrices, resident_matrices
from runtime.executor.hybrid.weights import GpuWeights
from runtime.executor.program.executor import CHUNK_TOKENS, ProgramExecutor
from runtime.executor.program.kv_tiers import KVTiers
from runtime.executor.program.lanes import Lane
from runtime.panels import PanelWeights
from runtime.streamed import StreamedWeights

log = logging.getLogger("strata.hybrid")

LEAST_CHUNK_TOKENS = 32  # of a prompt: below that, keys and values give way


class HybridExecutor(ProgramExecutor):
    """Runs `model`, read from `gguf`, on `device`, which belongs to this from now on, and `threads` threads."""

    kv_kind = HybridKV

    def __init__(
        self,
        model: Model,
        gguf: GGUFFile,
        placement: HybridPlacement,
        device: GpuDevice,
        *,
        threads: int = 1,
        chunk_tokens: int = CHUNK_TOKENS,
        context_tokens: int = 0,
        isa: ISA | None = None,
        tuning: Tuning | None = None,
        streamed: StreamedWeights | None = None,
        kernels: Kernels | None = None,
        rates: ExpertRates | None = None,
        kv_policy: KVPolicy | None = None,
        kv_tiers: KVTiers | None = None,
        on_load: Progress | None = None,
    ) -> None:
        """Loads the weights, each where it is used. `context_tokens`: of all sequences, reserved on the GPU at once.

        `streamed`, `isa`, `tuning`: as for `PanelWeights`. `kernels`: the GPU's; None: those that suit it. `rates` tell
        which experts are brought for a step; None: none are. `gguf` stays open where the GPU has routed layers. Others:
        as for `ProgramExecutor`. DeviceError where the GPU's memory does not hold its part; else as both of these.
        """
        self._device, self._stream = device, device.stream("compute")
        self._kernels = kernels or kernels_for(str(device.torch_device), is_simulated=device.is_simulated)
        self._placement = placement.checked_for(model)
        self._caches: weakref.WeakSet[HybridKV] = weakref.WeakSet()
        names = gpu_matrices(model, self._placement)
        weights = PanelWeights(
            gguf,
            model,
            isa=isa,
            threads=threads,
            streamed=streamed,
            tuning=tuning,
            elsewhere=names | resident_matrices(model, self._placement),
        )
        self._gpu_weights = GpuWeights(gguf, model, names, weights, device, self._stream, self._kernels)
        self._experts: GpuExperts | None = None
        try:
            load_both(weights, self._gpu_weights, on_load)
            if has_gpu_experts(model, self._placement):
                self._experts = self._new_experts(gguf, model, rates, streamed)
                self._experts.load(FiniteSums(device, self._stream, self._kernels))
            if streamed is not None:
                streamed.leave_out(self._has)
            policy = kv_policy or KVPolicy()
            self._pool = self._reserved_pool(model, policy, context_tokens)
            super().__init__(
                model, weights, threads=threads, chunk_tokens=chunk_tokens, kv_policy=policy, kv_tiers=kv_tiers
            )
        except BaseException as error:
            if self._experts is not None:
                self._experts.close()
            device.close()
            weights.close()
            if kv_tiers is not None:
                kv_tiers.close()
            if isinstance(error, torch.OutOfMemoryError):
                raise no_room(error) from error
            raise

    def new_kv(self, capacity_tokens: int, policy: KVPolicy | None = None) -> HybridKV:
        """See `Executor`; ValueError for a policy that is not the executor's own."""
        if policy is not None and policy != self._kv_policy:
            raise ValueError(f"a KV cache of {policy.name}: what the GPU reads is {self._kv_policy.name}")
        model = self.model
        shape = (model.head_count_kv, model.key_length, model.value_length)
        kv = HybridKV(self._pool, model.block_count, *shape, capacity_tokens, self._kv_policy, self.kv_tiers)
        self._caches.add(kv)
        return kv

    @property
    def most_pass_tokens(self) -> int:
        """See `TreeExecutor`: a GPU's attention takes all lanes at once, so that none may write over another's."""
        return 0

    @property
    def placement(self) -> HybridPlacement:
        """What the GPU computes now."""
        return self._placement

    @property
    def gpu_bytes(self) -> int:
        """Bytes of the GPU's memory that are in use."""
        return self._device.total_bytes - self._device.free_bytes

    @property
    def gpu_expert_counts(self) -> CacheCounts | None:
        """Of the experts that the GPU's layers used, how many were there; None where it has no such layers."""
        return None if self._experts is None else self._experts.counts

    def warm_up(self) -> None:
        """See `ProgramExecutor`; what its steps use is worth nothing."""
        if self._experts is not None:
            self._experts.learns = False
        super().warm_up()
        if self._experts is not None:
            self._experts.learns = True

    def fix_experts(self, tokens: int) -> None:
        """See `ExpertFixingExecutor`."""
        if self._experts is not None:
            self._experts.fix(tokens)
            self._hybrid.use_placement(self._placement)

    def close(self) -> None:
        """See `Executor`."""
        super().close()
        if self._experts is not None:
            self._experts.close()
        self._device.close()

    def _new_runner(self, threads: int) -> HybridRunner:
        return HybridRunner(
            self.model,
            self._weights,
            threads,
            self._most_tokens,
            placement=self._placement,
            device=self._device,
            stream=self._stream,
            kernels=self._kernels,
            gpu_weights=self._gpu_weights,
            pool=self._pool,
            experts=self._experts,
            kv_tiers=self.kv_tiers,
        )

    def _new_experts(
        self, gguf: GGUFFile, model: Model, rates: ExpertRates | None, streamed: StreamedWeights | None
    ) -> GpuExperts:
        """With as many of the placement's slots as there is memory for; torch.OutOfMemoryError if not for the rest."""
        while True:
            try:
                return GpuExperts(gguf, model, self._placement, self._device, rates=rates, streamed=streamed)
            except torch.OutOfMemoryError as error:
                fewer = self._placement.with_fewer_slots(model.expert_count)
                if fewer is None:
                    raise
                reason = str(error)  # not the error, whose frames hold memory of the GPU
            log.warning("%d slots for experts on the GPU, not more: %s", fewer.expert_slots, reason)
            self._placement = fewer

    def _reserved_pool(self, model: Model, policy: KVPolicy, tokens: int) -> KVPool:
        """Blocks for so many tokens; layers for which there is no memory even without slots for experts stay in RAM."""
        shape = (model.head_count_kv, model.key_length, model.value_length, PIECE_TOKENS)
        layouts = policy.layouts(model.block_count, *shape)
        while True:
            here = {layer: layouts[layer] for layer in self._placement.attention - self._placement.ram_kv}
            try:
                return KVPool(self._device, self._stream, here, tokens, self._placement.kv_tokens)
            except torch.OutOfMemoryError as error:
                reason = str(error)
            if not self._give_up_slots(reason):
                self._placement = self._placement.with_kv_in_ram(max(here))
                log.warning("keys and values of layer %d are kept in RAM: %s", max(here), reason)

    def _has(self, layer: int) -> NDArray[np.bool_]:
        """Which of the experts of a layer the GPU has, or whether it has all of a dense one."""
        if self.model.experts is None:
            return np.array([layer in self._placement.attention & self._placement.feed_forward])
        if self._experts is None:
            return np.zeros(self.model.experts.count, bool)
        return self._experts.has(layer)

    def _groups(self, single: Sequence[int], lanes: Sequence[Lane]) -> Iterator[Sequence[int]]:
        """Lanes that are computed together turn by the same angles."""
        for _, group in groupby(single, lambda index: factors_of(self.model, lanes[index].kv.capacity_tokens)):
            yield from super()._groups(list(group), lanes)

    def _compute(self, lanes: Sequence[Lane], logits_tokens: int) -> NDArray[np.float32]:
        """See `Runner.run`; gives way where the GPU's memory does not suffice."""
        tokens = len(lanes[0].token_ids)
        while True:
            if tokens > self._most_tokens:  # an earlier chunk of the same call has found too little memory
                return self._in_pieces(lanes[0], logits_tokens)
            try:
                return super()._compute(lanes, logits_tokens)
            except torch.OutOfMemoryError as error:
                reason = str(error)
            # not before: the error's frames hold memory of the GPU
            if tokens > LEAST_CHUNK_TOKENS:
                self._shorten_chunks(max(LEAST_CHUNK_TOKENS, tokens // 2), reason)
                continue
            self._hybrid.use_placement(self._placement)  # frees what steps that were recorded hold
            if not self._give_up_slots(reason) and not self._give_up_blocks(reason):
                self._move_keys_and_values(reason)

    def _in_pieces(self, lane: Lane, logits_tokens: int) -> NDArray[np.float32]:
        """The logits of the last tokens of a chunk that is too long now."""
        parts, step = [], self._most_tokens
        for first in range(0, len(lane.token_ids), step):
            piece = replace(lane, token_ids=lane.token_ids[first : first + step], start=lane.start + first)
            wanted = logits_tokens - (lane.stop - piece.stop)
            parts.append(self._compute([piece], min(max(wanted, 0), len(piece.token_ids))))
        return np.concatenate(parts)

    def _shorten_chunks(self, tokens: int, reason: str) -> None:
        log.warning("prompts go on in chunks of %d tokens: %s", tokens, reason)
        self._most_tokens = min(self._most_tokens, tokens)
        self._hybrid.shrink(self._most_tokens)

    def _give_up_slots(self, reason: str) -> bool:
        """Some of the slots for experts, which the CPU computes then; whether there were any to give up."""
        freed = 0 if self._experts is None else self._experts.shrink()
        if self._experts is None or not freed:
            return False
        kept = self._experts.num_places
        log.warning("%d bytes of slots for experts are given up, and %d slots kept: %s", freed, kept, reason)
        self._placement = replace(self._placement, expert_slots=kept, seeds=self._placement.seeds[:kept])
        return True

    def _give_up_blocks(self, reason: str) -> bool:
        """Some of the room for keys and values; whether there was any to give up."""
        if not self._pool.shrink():
            return False
        kept = self._pool.num_bytes
        log.warning("%d bytes are kept for keys and values, the oldest of which go to RAM: %s", kept, reason)
        return True

    def _move_keys_and_values(self, reason: str) -> None:
        """Those of the last layer that has them on the GPU move to RAM; DeviceError if there are none left.

        SequenceError where RAM and flash have no room for those of a sequence; then all stay where they are.
        """
        layer = max(self._pool.layers, default=None)
        if layer is None:
            raise DeviceError(
                f"the GPU's memory does not suffice, and all that can be in RAM is there: {reason}",
                hint="plan with a smaller GPU budget, or run it with --gpu off",
            )
        log.warning("keys and values of layer %d move to RAM: %s", layer, reason)
        bring_all_to_ram(list(self._caches), layer)
        self._pool.drop(layer)
        self._placement = self._placement.with_kv_in_ram(layer)
        self._hybrid.use_placement(self._placement)

    @property
    def _hybrid(self) -> HybridRunner:
        assert isinstance(self._runner, HybridRunner)
        return self._runner
