"""Programs made when they are needed, and their runs: embeddings in, parameters set, logits out.

Knows nothing of requests or of what caches hold: `Lane` says where in its cache a sequence goes on.
"""

import time
from collections.abc import Hashable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.attention import tile_tokens
from cpu_kernels.experts import most_segments
from cpu_kernels.kv_layout import BLOCK_TOKENS, pieces_of
from cpu_kernels.pool import OperationError, Pool
from cpu_kernels.program import Program
from offload.errors import ModelFormatError
from offload.expert_cache import ExpertCache
from offload.routing_trace import TraceRecorder
from runtime.architectures.base import Model
from runtime.executor.program.angles import Angles
from runtime.executor.program.attending import LaneRows, LayerAttention
from runtime.executor.program.cold_plan import ColdPlan
from runtime.executor.program.emitter import Emitter
from runtime.executor.program.kv_cold import ColdReads
from runtime.executor.program.kv_tiers import KVTiers
from runtime.executor.program.lanes import Lane
from runtime.executor.program.lowering import Lowering, attention_matrices
from runtime.executor.program.parameters import Name
from runtime.executor.program.programs import Programs, Settable
from runtime.executor.program.routing import Routing
from runtime.executor.program.sequence_layout import SequenceLayout
from runtime.executor.program.workspace import Workspace
from runtime.panels import PanelWeights

LOGITS_TOKENS = 16  # whose logits are computed in one run
MAX_LANES = 64


class Runner:
    """Runs steps of `model` on `threads` threads, of up to `chunk_tokens` tokens each.

    ValueError for heads that the kernels do not know.
    """

    def __init__(
        self,
        model: Model,
        weights: PanelWeights,
        threads: int,
        chunk_tokens: int,
        workspace: Workspace | None = None,
        kv_tiers: KVTiers | None = None,
    ) -> None:
        self._model = model
        self._weights = weights
        self._chunk_tokens = max(chunk_tokens, MAX_LANES)
        self.few_tokens = tile_tokens(model.head_count, model.head_count_kv)
        self._workspace = workspace or Workspace()
        self._x = self._workspace.array("x", self._chunk_tokens, model.embedding_length)
        self._normed = self._workspace.matrix("normed", self._chunk_tokens, model.embedding_length)
        self._logits = self._workspace.array("logits", LOGITS_TOKENS, model.vocab_size)
        self._angles = Angles(model, weights)
        self._recorder: TraceRecorder | None = None
        self._head: Settable | None = None
        self._programs = Programs()
        self._variant: Hashable = None  # what else programs differ by
        self._cold = ColdReads(kv_tiers or KVTiers(), [layer.sliding_window for layer in model.layers])
        self._pool = self._new_pool(threads)
        self._ran_tokens = 0

    def features(self, tokens: int) -> NDArray[np.float32]:
        """Hidden states behind the output norm of the last run's last tokens, (tokens, width): a copy.

        ValueError for more than it had.
        """
        if tokens > self._ran_tokens:
            raise ValueError(f"features of {tokens} tokens after a run of {self._ran_tokens}")
        rows = self._workspace.array("normed", self._chunk_tokens, self._model.embedding_length)
        return rows[self._ran_tokens - tokens : self._ran_tokens].copy()

    def read_features(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits (n, vocab) of up to `LOGITS_TOKENS` hidden states (n, width); those of the last run stay."""
        rows = self._workspace.array("foretold", LOGITS_TOKENS, self._model.embedding_length)
        rows[: len(features)] = features
        self._read(int(rows.ctypes.data), len(features))
        return self._logits[: len(features)].copy()

    def make_spilled_kernels(self, layout: SequenceLayout) -> None:
        """Makes or loads those that prompts use alone once chunks lie on flash, when memory has become scarce."""
        emitter, lane = self._emitter(), LaneRows(0, layout, 1, 0)
        qkv, attended = attention_matrices(self._model, self._workspace, self._chunk_tokens)
        queries = qkv.slice(0, self._model.head_count * self._model.key_length)
        for layer in self._model.layers:
            LayerAttention(emitter, layer, None, split=False).of(lane, attended, queries).range_row(0, 0, None)

    def compute(self, program: Program) -> None:
        """Runs a program of the caller's on the same threads."""
        self._pool.run(program)

    def record(self, recorder: TraceRecorder) -> None:
        """Hands the routing of every run to `recorder` from now on."""
        self._programs.clear()
        self._recorder = recorder

    def set_threads(self, threads: int) -> None:
        """Runs on that many threads from the next run on. ValueError for fewer than 1 or more than 1024."""
        pool = self._new_pool(threads)
        self._pool.close()
        self._pool = pool

    def close(self) -> None:
        """Ends the threads and the reads of weights; may be called twice."""
        self._pool.close()
        self._cold.close()
        self._weights.close()
        self._programs.clear()

    def run(self, lanes: Sequence[Lane], logits_tokens: int) -> NDArray[np.float32]:
        """The logits of the last `logits_tokens` tokens, (logits_tokens, vocab).

        At most `chunk_tokens` tokens of one lane, or `few_tokens` of each of up to `MAX_LANES`.
        """
        for kv in dict.fromkeys(lane.kv for lane in lanes):
            own = [lane for lane in lanes if lane.kv is kv]
            kv.prepare(min(lane.start for lane in own), max(lane.stop for lane in own))
        for lane in lanes:
            lane.kv.place()
        plan = self._cold.begin(lanes)
        try:
            return self._run_lanes(lanes, logits_tokens, plan)
        finally:
            self._cold.end()

    def _run_lanes(self, lanes: Sequence[Lane], logits_tokens: int, plan: ColdPlan | None) -> NDArray[np.float32]:
        """`plan`: see `ColdReads.begin`."""
        token_ids = [token for lane in lanes for token in lane.token_ids]
        count = len(token_ids)
        self._embed(token_ids)
        self._ran_tokens = count
        # experts are guessed where each sequence goes on by a token: the runs that are compared must be alike
        guessing = self._streamed_experts() if count == len(lanes) else None
        program = self._program(
            tuple(lane.layout for lane in lanes),
            split=len(lanes) > 1 or count <= self.few_tokens,
            foresees=guessing is not None and guessing.gate.is_open,
            plan=plan,
        )
        program.set(Name.TOKENS, count)
        if self._model.experts is not None:
            used, experts = self._model.experts.used_count, self._model.experts.count
            program.set(Name.SEGMENTS, most_segments(count, used, experts))
        self._set_lanes(program, lanes)
        at_once = logits_tokens if logits_tokens <= LOGITS_TOKENS else 0
        started = time.perf_counter()
        self._step(program, lanes, count - at_once, at_once)
        if guessing is not None:
            guessing.run_took(time.perf_counter() - started, count)
        if self._recorder is not None:
            self._hand_over_routing(self._recorder, count, begins=any(lane.start == 0 for lane in lanes))
        logits = np.empty((logits_tokens, self._model.vocab_size), np.float32)
        logits[:at_once] = self._logits[:at_once]
        for first in range(at_once, logits_tokens, LOGITS_TOKENS):
            last = min(first + LOGITS_TOKENS, logits_tokens)
            self._more_logits(count - logits_tokens + first, last - first)
            logits[first:last] = self._logits[: last - first]
        return logits

    def _new_pool(self, threads: int) -> Pool:
        return Pool(threads)

    def _step(self, program: Settable, lanes: Sequence[Lane], first_wanted: int, wanted: int) -> None:
        """A run of all layers, and the logits of some of its tokens."""
        self._run(program, first_wanted, wanted)

    def _more_logits(self, first_wanted: int, wanted: int) -> None:
        """The logits of other tokens of the last run."""
        self._read(self._normed.address + first_wanted * self._normed.stride_bytes, wanted)

    def _read(self, address: int, wanted: int) -> None:
        """The logits of so many hidden states, which lie as in `normed`."""
        if self._head is None:
            self._head = Settable(self._lowering().head())
        self._run_from(self._head, address, wanted)

    def _embed(self, token_ids: Sequence[int]) -> None:
        rows = self._x[: len(token_ids)]
        rows[...] = self._weights.embeddings(token_ids)
        if self._model.embedding_scale != 1.0:
            rows *= np.float32(self._model.embedding_scale)

    def _set_lanes(self, program: Settable, lanes: Sequence[Lane]) -> None:
        """Where each lane's tokens and cache lie; chunks are taken for them."""
        row, reach = 0, max(lane.stop for lane in lanes)
        attends = program.has(Name.QKV.of(0))
        for number, lane in enumerate(lanes):
            if attends:
                matrices = attention_matrices(self._model, self._workspace, self._chunk_tokens)
                for name, matrix in zip((Name.QKV, Name.ATTENDED), matrices, strict=True):
                    program.set(name.of(number), matrix.address + row * matrix.stride_bytes)
            row += len(lane.token_ids)
            self._set_lane(program, number, lane, reach)

    def _set_lane(self, program: Settable, number: int, lane: Lane, reach: int) -> None:
        """`reach`: the position after the last token of all lanes."""
        program.set(Name.COUNT.of(number), len(lane.token_ids))
        program.set(Name.START.of(number), lane.start)
        program.set(Name.PIECES.of(number), pieces_of(lane.stop))
        program.set(Name.KV.of(number), lane.kv.table_address)
        program.set(Name.WINDOW.of(number), lane.kv.window_address)
        if lane.kv.abstracts is not None:
            fills = lane.start // BLOCK_TOKENS < lane.stop // BLOCK_TOKENS
            program.set(Name.FILLED.of(number), self._model.head_count_kv if fills else 0)
            program.set(Name.ABSTRACTS.of(number), lane.kv.abstracts.address)
            program.set(Name.CHOICES.of(number), lane.kv.abstracts.counts_address)
        for rope, (cos, sin) in enumerate(self._angles.addresses(lane.kv.capacity_tokens, reach)):
            program.set(Name.COS.of(number, rope), cos)
            program.set(Name.SIN.of(number, rope), sin)

    def _run(self, program: Settable, first_wanted: int, wanted: int) -> None:
        self._run_from(program, self._normed.address + first_wanted * self._normed.stride_bytes, wanted)

    def _run_from(self, program: Settable, address: int, wanted: int) -> None:
        """With the logits of so many hidden states from `address` on."""
        program.set(Name.WANTED, wanted)
        program.set(Name.FIRST_WANTED, address)
        try:
            self._pool.run(program.program)
        except OperationError as error:
            streamed = self._weights.streamed
            unread = None if streamed is None else streamed.cache.recover()
            cause = self._cold.failure() or unread
            if cause is not None:
                raise cause from error
            raise ModelFormatError(
                f"numbers inside of the model became infinite or undefined: {error}",
                hint="the file is damaged or was converted wrongly",
            ) from error

    def _hand_over_routing(self, recorder: TraceRecorder, tokens: int, *, begins: bool) -> None:
        """What the last run's routers decided."""
        assert self._model.experts is not None, "only routed models are recorded"
        used = self._model.experts.used_count
        if begins:
            recorder.begin_sequence()
        layers = [layer for layer in self._model.layers if layer.ffn_gate_inp is not None]
        for number, layer in enumerate(layers):
            routing = Routing(self._workspace, self._chunk_tokens * used, layer.index)
            pairs = routing.ids[: tokens * used], routing.weights[: tokens * used]
            recorder.add(number, *(values.reshape(tokens, used) for values in pairs))
        recorder.end_step()

    def _streamed_experts(self) -> ExpertCache | None:
        """The cache of routed experts, if they are streamed."""
        streamed = self._weights.streamed
        return None if streamed is None or self._model.experts is None else streamed.cache

    def _program(
        self, layouts: tuple[SequenceLayout, ...], *, split: bool, foresees: bool, plan: ColdPlan | None
    ) -> Settable:
        cold = None if plan is None else self._cold
        new = partial(self._new_program, layouts, split=split, foresees=foresees, cold=cold)
        return self._programs.get((layouts, split, foresees, self._variant), plan, new)

    def _new_program(
        self, layouts: tuple[SequenceLayout, ...], *, split: bool, foresees: bool, cold: ColdReads | None
    ) -> Program:
        return self._lowering(foresees=foresees, cold=cold).step(layouts, split=split)

    def _lowering(self, *, foresees: bool = False, cold: ColdReads | None = None) -> Lowering:
        return Lowering(self._emitter(foresees=foresees), LOGITS_TOKENS, cold)

    def _emitter(self, *, foresees: bool = False) -> Emitter:
        place = (self._model, self._weights, self._workspace, self._chunk_tokens)
        return Emitter(*place, keeps_routing=self._recorder is not None, foresees=foresees)
