"""Which parts of a model a GPU computes. Knows nothing about how a plan is found or how a part is computed.

A *part* is the attention of a layer with its KV cache, the feed-forward of a layer (dense; or router and shared expert
of a routed one), or the output head with its norm. What is not the GPU's is the CPU's; embeddings always are.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from planner.hybrid_split import Split
from runtime.architectures.base import Model

SeedExpert = tuple[int, int]  # layer, expert


@dataclass(frozen=True, slots=True)
class HybridPlacement:
    """The GPU's parts of a model, and the experts that lie in its memory.

    `attention`, `feed_forward`: layers whose part is the GPU's. `ram_kv`: those of `attention` whose keys and values
    stay in RAM, where the CPU attends over them between the GPU's products. `resident`: routed layers of
    `feed_forward` all of whose experts lie in the GPU's memory for good, and nowhere else. `expert_slots`: places there
    for routed experts of the layers of `feed_forward`, those of `resident` included; the others are copies of what RAM
    holds. `seeds`: what fills them at first, the most useful first. `brought_slots`: further places, of every kind of
    layer, for experts that are brought for one layer of one step, where that pays. `kv_tokens`: whose keys and values
    the GPU's memory has room for, of all sequences together; the oldest of more lie in RAM, where the CPU attends over
    them while the GPU does over the others. None: for as many as come.
    """

    attention: frozenset[int] = frozenset()
    feed_forward: frozenset[int] = frozenset()
    output: bool = False
    resident: frozenset[int] = frozenset()
    expert_slots: int = 0
    seeds: tuple[SeedExpert, ...] = ()
    ram_kv: frozenset[int] = frozenset()
    brought_slots: int = 0
    kv_tokens: int | None = None

    @classmethod
    def of(cls, split: Split, seeds: tuple[SeedExpert, ...], brought_slots: int) -> "HybridPlacement":
        """What a plan splits."""
        return cls(
            attention=split.attention,
            feed_forward=split.feed_forward,
            output=split.output,
            resident=split.resident,
            expert_slots=split.slots,
            seeds=seeds,
            brought_slots=brought_slots,
            kv_tokens=split.kv_tokens,
        )

    @classmethod
    def whole(cls, model: Model) -> "HybridPlacement":
        """Everything but the embeddings on the GPU."""
        layers = frozenset(range(model.block_count))
        routed = frozenset(layer.index for layer in model.layers if layer.ffn_gate_inp is not None)
        slots = len(routed) * model.expert_count
        return cls(layers, layers, output=True, resident=routed, expert_slots=slots)

    @property
    def is_empty(self) -> bool:
        """Whether the CPU computes everything."""
        return not (self.attention or self.feed_forward or self.output)

    def checked_for(self, model: Model) -> "HybridPlacement":
        """This placement with seeds that can be used; ValueError for one that does not fit the model."""
        layers = frozenset(range(model.block_count))
        routed = frozenset(layer.index for layer in model.layers if layer.ffn_gate_inp is not None)
        for name, chosen, allowed in (
            ("attention", self.attention, layers),
            ("feed_forward", self.feed_forward, layers),
            ("ram_kv", self.ram_kv, self.attention),
            ("resident", self.resident, self.feed_forward & routed),
        ):
            if not chosen <= allowed:
                raise ValueError(f"{name} names layers {sorted(chosen - allowed)}, which it cannot")
        resident = len(self.resident) * model.expert_count
        if self.expert_slots < resident:
            raise ValueError(f"{self.expert_slots} slots for the {resident} experts of layers {sorted(self.resident)}")
        if self.kv_tokens is not None and self.kv_tokens < 1:
            raise ValueError(f"kv_tokens is {self.kv_tokens}; it must be at least 1")
        return replace(self, seeds=tuple(self._usable_seeds(model, self.feed_forward & routed)))

    def with_kv_in_ram(self, layer: int) -> "HybridPlacement":
        """The same with a layer's keys and values in RAM."""
        return replace(self, ram_kv=self.ram_kv | {layer})

    def with_fewer_slots(self, experts: int) -> "HybridPlacement | None":
        """The same with a quarter fewer places for experts of layers that are not resident, which have `experts` each.

        Without any the places for those of one step go; None where nothing is left.
        """
        resident = len(self.resident) * experts
        if kept := self.expert_slots - resident:
            slots = resident + kept * 3 // 4
            return replace(self, expert_slots=slots, seeds=self.seeds[:slots])
        return replace(self, brought_slots=0) if self.brought_slots else None

    def _usable_seeds(self, model: Model, routed: frozenset[int]) -> Iterable[SeedExpert]:
        """All experts of resident layers, then the other seeds once each."""
        resident = [(layer, expert) for layer in sorted(self.resident) for expert in range(model.expert_count)]
        for layer, expert in self.seeds:
            if layer not in routed or not 0 <= expert < model.expert_count:
                raise ValueError(f"seeds names expert {expert} of layer {layer}, which the GPU does not compute")
        return tuple(dict.fromkeys([*resident, *self.seeds]))[: self.expert_slots]
