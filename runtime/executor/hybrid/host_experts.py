"""The CPU's part of a layer whose router is on the GPU: the row that shares its experts out, and its own experts.

Knows nothing about how the GPU computes the others.
"""

from dataclasses import dataclass

from cpu_kernels.expert_split import HostTables, split_row
from cpu_kernels.waiting import HostCall
from runtime.architectures.base import Layer
from runtime.executor.hybrid.experts import GpuExperts
from runtime.executor.hybrid.gpu_experts import ExpertTables
from runtime.executor.hybrid.handover import HostSide
from runtime.executor.program.emitter import Emitter
from runtime.executor.program.experts import RoutingTables, add_expert_share
from runtime.executor.program.parameters import SEGMENTS, TOKENS


@dataclass(frozen=True, slots=True)
class HostExperts:
    """Adds layers to a program. `brought`: what is called when experts that were brought are there."""

    emitter: Emitter
    experts: GpuExperts
    tables: ExpertTables
    brought: HostCall

    def add(self, side: HostSide, layer: Layer, *, few: bool) -> None:
        """The rows of a layer, for steps of few tokens or of many."""
        emitter, is_resident = self.emitter, self.experts.is_resident(layer.index)
        model, program = emitter.model, emitter.program
        assert model.experts is not None, "only routed models have experts"
        call = None
        if self.experts.may_bring(layer.index, few=few):
            call = self.experts.choose_call(layer.index, program.status_address, self.brought)
        rows = RoutingTables.of(emitter, layer, model.experts)
        side.wait()
        program.add(
            split_row(
                *(rows.topk_ids, rows.topk_weights, TOKENS),
                used=model.experts.used_count,
                experts=model.experts.count,
                places=self.experts.places(layer.index),
                host=HostTables(rows.offsets, rows.slot_of_pair, rows.token_of_slot),
                tables=int(self.tables.array.ctypes.data),
                segments=SEGMENTS,
                status=program.status_address,
                choose=call,
            )
        )
        side.signal()
        if not is_resident:
            normed, out = (emitter.matrix(name, model.embedding_length) for name in ("normed", "delta"))
            add_expert_share(emitter, layer, model.experts, normed=normed, out=out)
            side.signal()
