"""Rows of one layer's attention for the lanes of a pass: at once, or range by range where chunks come from flash.

What a lane has in RAM does not wait for what it has on flash, where pieces are shared out; else pieces must go in
order. Knows nothing about how chunks are read, nor about other parts of a layer.
"""

from dataclasses import dataclass

from cpu_kernels.attention import Attention, carried_floats, partial_floats, tile_tokens
from cpu_kernels.heads import Rotation
from cpu_kernels.kv_layout import KVMemory
from cpu_kernels.matrix import AnyMatrix, LaterMatrix, Matrix
from cpu_kernels.program import Field, Parameter
from runtime.architectures.base import Layer, Rope, RopeOrder
from runtime.executor.program.cold_plan import Run, gaps
from runtime.executor.program.emitter import Emitter
from runtime.executor.program.kv_cold import ColdReads
from runtime.executor.program.parameters import Name
from runtime.executor.program.sequence_layout import SequenceLayout


@dataclass(frozen=True, slots=True)
class LaneRows:
    """What rows need to know of one lane."""

    number: int
    layout: SequenceLayout
    tokens: Field
    rope: int

    def rows(self, name: Name, matrix: Matrix) -> LaterMatrix:
        """Its rows of a matrix."""
        return LaterMatrix(Parameter(name.of(self.number)), matrix.columns, matrix.stride)

    @property
    def start(self) -> Parameter:
        """The position of its first token."""
        return Parameter(Name.START.of(self.number))

    def memory(self, layer: Layer) -> KVMemory:
        """Where a layer's keys and values lie."""
        table = Parameter(Name.KV.of(self.number), offset=self.layout.table_start(layer.index))
        window = Parameter(Name.WINDOW.of(self.number), offset=self.layout.window_starts[layer.index])
        return KVMemory(self.layout.layers[layer.index], table, window)

    def rotation(self, rope: Rope) -> Rotation:
        """How a layer's heads turn."""
        cos, sin = (Parameter(name.of(self.number, self.rope)) for name in (Name.COS, Name.SIN))
        return Rotation(cos, sin, rope.dimension_count // 2, rope.order is RopeOrder.NORM)


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A lane that attends to chunks from flash too. `memory`: the address of what its rows pass on to each other."""

    attention: Attention
    pieces: Field
    memory: int


class LayerAttention:
    """For each lane in turn `add`, then `finish`. `split`: shares the context of few tokens among the threads."""

    def __init__(self, emitter: Emitter, layer: Layer, cold: ColdReads | None, *, split: bool) -> None:
        """`cold`: brings what lies on flash by its plan; None where nothing does."""
        self._emitter, self._layer, self._cold, self._split = emitter, layer, cold, split
        self._waiting: dict[int, _Waiting] = {}

    def runs(self, lane: LaneRows) -> list[Run]:
        """A lane's pieces that come from flash."""
        if self._cold is None:
            return []
        return sorted(run for runs in self._cold.plan.runs(self._layer.index, lane.number) for run in runs)

    def of(
        self,
        lane: LaneRows,
        out: AnyMatrix,
        queries: AnyMatrix,
        *,
        chosen: int | None = None,
        part_pieces: Parameter | None = None,
    ) -> Attention:
        """That of a lane's tokens. `chosen`, `part_pieces`: see `Attention`."""
        model = self._emitter.model
        return Attention(
            *(out, queries, lane.memory(self._layer)),
            tokens=lane.tokens,
            start=lane.start,
            scale=model.attention_scale,
            window=self._layer.sliding_window,
            softcap=model.attention_softcap,
            chosen=chosen,
            part_pieces=part_pieces,
            isa=self._emitter.isa,
        )

    def add(self, lane: LaneRows, attention: Attention) -> None:
        """A lane's attention, as far as it need not wait."""
        program, runs = self._emitter.program, self.runs(lane)
        pieces = Parameter(Name.PIECES.of(lane.number)) if attention.part_pieces is None else attention.part_pieces
        if runs:
            waiting = _Waiting(attention, pieces, self._memory(lane, apart=True))
            self._waiting[lane.number] = waiting
            for first, end in gaps(runs) if self._split else ():
                program.add(attention.pieces_row(waiting.memory, first, pieces if end is None else end))
        elif self._split:
            for row in attention.split_rows(self._memory(lane, apart=False), pieces):
                program.add(row)
        else:
            program.add(attention.row())

    def finish(self) -> None:
        """Attention to what comes from flash, and what depends on it."""
        if self._cold is None:
            return
        program, begun = self._emitter.program, dict.fromkeys(self._waiting, 0)
        for part in self._cold.plan.layers[self._layer.index]:
            program.add(self._cold.await_row(part))
            for number, runs in part.lanes:
                its = self._waiting[number]
                if self._split:
                    for first, end in runs:
                        program.add(its.attention.pieces_row(its.memory, first, end))
                else:
                    first, begun[number] = begun[number], runs[-1][1]
                    program.add(its.attention.range_row(its.memory, first, begun[number]))
            program.add(self._cold.over_row())
        for number, its in self._waiting.items():
            if self._split:
                program.add(its.attention.merge_row(its.memory, its.pieces))
            else:
                program.add(its.attention.range_row(its.memory, begun[number], None))

    def _memory(self, lane: LaneRows, *, apart: bool) -> int:
        """The address of what a lane's rows pass on to each other; `apart`: while other lanes' rows run between."""
        model, layout = self._emitter.model, lane.layout.layers[self._layer.index]
        own = f"_{lane.number}" if apart else ""
        if self._split:
            name = f"pieces_{layout.capacity_tokens}{own}"
            floats = partial_floats(model.head_count, layout, tile_tokens(model.head_count, model.head_count_kv))
        else:
            name = f"carried{own}"
            floats = carried_floats(model.head_count, layout, self._emitter.capacity)
        return int(self._emitter.workspace.array(name, 1, floats).ctypes.data)
