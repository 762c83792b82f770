"""Runs a model as programs: tables of operations that a pool of threads goes through without Python in between.

Between two runs Python looks up the tokens' embeddings and sets a few parameters. Knows nothing about architectures'
names, plans or sampling. Invariants: a token's logits are the same, bit for bit, whatever else is computed beside it,
in chunks of any size and on any number of threads; caches change only when a whole call has succeeded.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.kv_policy import KVPolicy
from cpu_kernels.program import Program
from offload.cache_counts import CacheCounts
from offload.errors import RequestError, UnsupportedModelError
from offload.prefetch_gate import PrefetchMode
from offload.routing_trace import TraceRecorder
from runtime.architectures.base import Model
from runtime.executor.base import KVHandle, LogitsWanted, Step, checked_caches
from runtime.executor.program.kv import ProgramKV
from runtime.executor.program.kv_tiers import KVTiers
from runtime.executor.program.lanes import Lane, lanes_of
from runtime.executor.program.runner import MAX_LANES, Runner
from runtime.panels import PanelWeights

CHUNK_TOKENS = 256  # of a prompt in one run, where nothing else is asked for
MOST_PASS_TOKENS = 64  # of several sequences, or of a tree, in one pass
LEAST_TOKENS = 8  # for whose experts of a layer a cache keeps slots
LEAST_LAYERS = 3  # of a dense model that a cache keeps slots for


class ProgramExecutor:
    """Runs `model` with `weights`, which are loaded, on `threads` threads; caches hold what `kv_policy` says.

    A run takes up to `chunk_tokens` tokens of a prompt, fewer where the experts they may use would not all find a slot.
    """

    kv_kind: type[ProgramKV] = ProgramKV

    def __init__(
        self,
        model: Model,
        weights: PanelWeights,
        *,
        threads: int = 1,
        chunk_tokens: int = CHUNK_TOKENS,
        kv_policy: KVPolicy | None = None,
        kv_tiers: KVTiers | None = None,
    ) -> None:
        """`kv_tiers` are closed with this. UnsupportedModelError for heads that the kernels do not know."""
        self.model = model
        self._weights = weights
        self._kv_policy = kv_policy or KVPolicy()
        self.kv_tiers = kv_tiers or KVTiers()
        slots = sys.maxsize if weights.streamed is None else weights.streamed.slots.slots
        self._chunk_tokens = self._most_tokens = min(chunk_tokens, _tokens_that_slots_serve(model, slots))
        try:
            self._runner = self._new_runner(threads)
        except ValueError as error:
            raise UnsupportedModelError(str(error), hint="run it with --loop sequential") from error

    def _new_runner(self, threads: int) -> Runner:
        return Runner(self.model, self._weights, threads, self._most_tokens, kv_tiers=self.kv_tiers)

    def new_kv(self, capacity_tokens: int, policy: KVPolicy | None = None) -> ProgramKV:
        """See `Executor`; `policy` in place of the executor's own."""
        model = self.model
        shape = (model.head_count_kv, model.key_length, model.value_length)
        policy = policy or self._kv_policy
        tiers = self.kv_tiers if policy == self._kv_policy or not self.kv_tiers.spills else KVTiers()
        return ProgramKV(model.block_count, *shape, capacity_tokens, policy, tiers)

    def share_kv(self, kv: KVHandle, other: KVHandle, tokens: int) -> int:
        """See `SharingExecutor`."""
        assert isinstance(kv, ProgramKV), "a cache of this executor"
        assert isinstance(other, ProgramKV), "a cache of this executor"
        return kv.share(other, tokens)

    @property
    def cache_counts(self) -> CacheCounts | None:
        """What the cache of experts has seen; None where all are in RAM."""
        return None if self._weights.streamed is None else self._weights.streamed.cache.counts

    def warm_up(self) -> None:
        """Make or load every kernel now, so that the first answer does not wait for them."""
        for count in (1, self._runner.few_tokens + 1):  # the two kinds of programs
            self.forward([Step([0] * count, self.new_kv(count))])
        if self.kv_tiers.spills:
            self._runner.make_spilled_kernels(self.new_kv(1).layout)

    def set_prefetch(self, mode: PrefetchMode) -> None:
        """See `PrefetchingExecutor`."""
        if self._weights.streamed is not None:
            self._weights.streamed.cache.set_prefetch(mode)

    def shrink_cache(self, num_bytes: int) -> int:
        """See `RoutedExecutor`."""
        streamed = self._weights.streamed
        if streamed is None:
            return 0
        slot_bytes, slots = streamed.slots.slot_bytes, streamed.slots.slots
        least = LEAST_LAYERS if self.model.experts is None else LEAST_TOKENS * self.model.experts.used_count
        kept = max(slots - -(-num_bytes // slot_bytes), min(least, slots))
        streamed.cache.resize(kept)
        self._most_tokens = min(self._chunk_tokens, _tokens_that_slots_serve(self.model, kept))
        return (slots - kept) * slot_bytes

    def record_routing(self, model_name: str) -> TraceRecorder:
        """Collects what the routers decide from now on; RequestError for a model without routed experts."""
        experts = self.model.experts
        if experts is None:
            raise RequestError(f"{model_name} has no routed experts", hint="leave out --record-routing")
        layers = sum(layer.ffn_gate_inp is not None for layer in self.model.layers)
        recorder = TraceRecorder(model_name, layers, experts.count, experts.used_count)
        self._runner.record(recorder)
        return recorder

    def set_threads(self, threads: int) -> None:
        """See `ThreadedExecutor`. ValueError for fewer than 1 or more than 1024."""
        self._runner.set_threads(threads)

    def features(self, tokens: int) -> NDArray[np.float32]:
        """See `FeatureExecutor`."""
        return self._runner.features(tokens)

    def read_features(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `FeatureExecutor`."""
        return self._runner.read_features(features)

    def compute(self, program: Program) -> None:
        """See `FeatureExecutor`."""
        self._runner.compute(program)

    def close(self) -> None:
        """See `Executor`."""
        self._runner.close()
        self.kv_tiers.close()

    def forward(self, steps: Sequence[Step], *, logits: LogitsWanted = "last") -> list[NDArray[np.float32]]:
        """See `Executor`. Sequences that go on by one token, or trees and few tokens, are computed together."""
        caches = checked_caches(steps, self.kv_kind, self.model.vocab_size)
        lanes = [Lane(step.token_ids, kv, kv.length) for step, kv in zip(steps, caches, strict=True)]
        branches = self._branches(steps, caches) if logits == "all" else None
        results = self._apart(lanes, logits) if branches is None else dict(enumerate(self._in_one_pass(branches)))
        for step, kv in zip(steps, caches, strict=True):
            kv.grow(kv.length + step.grows)
        self.kv_tiers.write_ahead()
        return [results[index] for index in range(len(lanes))]

    @property
    def most_pass_tokens(self) -> int:
        """See `TreeExecutor`."""
        return min(MOST_PASS_TOKENS, self._most_tokens)

    def _branches(self, steps: Sequence[Step], caches: Sequence[ProgramKV]) -> list[list[Lane]] | None:
        """The lanes of each step where one pass takes them all, and more than a token of some; None where not.

        ValueError for a tree that no pass takes.
        """
        tokens = sum(len(step.token_ids) for step in steps)
        has_tree = any(step.parents is not None for step in steps)
        if not has_tree and (len(steps) == 1 or tokens == len(steps)):
            return None
        most = self._runner.few_tokens
        branches = [lanes_of(step, kv, most) for step, kv in zip(steps, caches, strict=True)]
        if tokens <= self.most_pass_tokens and sum(len(lanes) for lanes in branches) <= MAX_LANES:
            return branches
        if has_tree:
            raise ValueError(f"trees of {tokens} tokens; a pass takes {self.most_pass_tokens}")
        return None

    def _in_one_pass(self, branches: Sequence[Sequence[Lane]]) -> Iterator[NDArray[np.float32]]:
        """The logits of every token of each step."""
        lanes = [lane for of_step in branches for lane in of_step]
        counts = [sum(len(lane.token_ids) for lane in of_step) for of_step in branches]
        rows = self._compute(lanes, sum(counts))
        first = 0
        for count in counts:
            yield rows[first : first + count]
            first += count

    def _apart(self, lanes: Sequence[Lane], logits: LogitsWanted) -> dict[int, NDArray[np.float32]]:
        """The logits of each lane: those of one token are computed together, the others one after the other."""
        results: dict[int, NDArray[np.float32]] = {}
        single = sorted(
            (index for index, lane in enumerate(lanes) if len(lane.token_ids) == 1),
            key=lambda index: lanes[index].kv.layout.capacity_tokens,  # so that fewer programs are needed
        )
        for together in self._groups(single, lanes):
            ones = [replace(lanes[index], chooses=True) for index in together]
            rows = self._compute(ones, 0 if logits == "none" else len(together))
            for place, index in enumerate(together):
                results[index] = rows[place : place + 1] if logits != "none" else rows
        for index, lane in enumerate(lanes):
            if index not in results:
                results[index] = self._in_chunks(lane, logits)
        return results

    def _groups(self, single: Sequence[int], lanes: Sequence[Lane]) -> Iterator[Sequence[int]]:
        """Indices of lanes that are computed together, of `single`."""
        at_once = min(MAX_LANES, self._most_tokens)
        for first in range(0, len(single), at_once):
            yield single[first : first + at_once]

    def _compute(self, lanes: Sequence[Lane], logits_tokens: int) -> NDArray[np.float32]:
        """See `Runner.run`."""
        return self._runner.run(lanes, logits_tokens)

    def _in_chunks(self, lane: Lane, wanted: LogitsWanted) -> NDArray[np.float32]:
        """All tokens of a sequence."""
        parts, step = [], self._most_tokens  # which may shrink meanwhile
        for first in range(0, len(lane.token_ids), step):
            ids = lane.token_ids[first : first + step]
            chunk = Lane(ids, lane.kv, lane.start + first, chooses=wanted == "all")
            is_last = chunk.stop == lane.stop
            logits_tokens = len(chunk.token_ids) if wanted == "all" else int(wanted == "last" and is_last)
            parts.append(self._compute([chunk], logits_tokens))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _tokens_that_slots_serve(model: Model, slots: int) -> int:
    """Tokens whose experts of one layer find a slot each, whatever the router chooses."""
    if model.experts is None:
        return sys.maxsize
    return sys.maxsize if slots >= model.experts.count else max(1, slots // model.experts.used_count)
