"""How much of a plan's keys and values lies on flash with the context full. Knows nothing about how plans are found."""

from offload.tiers import Tier
from planner.hybrid_spill import HostKV
from planner.hybrid_split import split_of
from planner.kv_spill import cold_bytes
from planner.model_shape import ModelShape, UnitKind
from planner.plan import Plan
from planner.ways import HYBRID


def flash_kv_bytes(shape: ModelShape, plan: Plan) -> int:
    """Bytes, of a model whose cache has the plan's types."""
    chosen, tokens = plan.settings, plan.settings.context_tokens
    if chosen.kv_ram_bytes is None:
        caches = (one for one in plan.placements if one.kind is UnitKind.KV)
        return sum(one.num_bytes for one in caches if one.tier is Tier.FLASH)
    if chosen.loop == HYBRID:
        split = split_of(shape, plan.placements, chosen.gpu_slots, chosen.gpu_kv_tokens)
        return HostKV.of(shape, split, tokens).cold_bytes(chosen.kv_ram_bytes)
    return cold_bytes(shape, tokens, chosen.kv_ram_bytes, tokens=tokens)
