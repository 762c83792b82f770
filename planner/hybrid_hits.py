"""How often experts are found on the GPU: learned from runs by a profile, and told for a number of slots.

Kept beside the hits in RAM, under a key of their own. Slots are counted as if every layer with experts had its share of
them, so that plans with other layers on the GPU can be told from the same points. Knows nothing about time.
"""

from offload.tiers import Device
from planner.hit_curve import HitCurve, traced_curve
from planner.model_shape import ModelShape, UnitKind
from planner.plan import Plan, PlannedModel
from planner.profile import Profile
from planner.streamed import all_slots, hit_curve


def gpu_hits_key(model: PlannedModel) -> str:
    """Names a model's hits on the GPU in a profile."""
    return f"{model.key}/gpu"


def gpu_hit_curve(shape: ModelShape, profile: Profile, model: PlannedModel) -> HitCurve:
    """As earlier runs measured, or as assumed."""
    points = profile.hits.get(gpu_hits_key(model))
    return hit_curve(shape, None if points is None else traced_curve(points, all_slots(shape)))


def slots_of_both(plan: Plan) -> int:
    """The places for experts in RAM and on the GPU together, as if all layers shared them; 0 where RAM has all.

    As `FlashExperts` has it: both caches count as one.
    """
    experts = [p.device for p in plan.placements if p.kind is UnitKind.EXPERTS]
    resident, slots = experts.count(Device.GPU), plan.settings.stream_slots
    if not slots or resident == len(experts):
        return 0
    slots += plan.settings.gpu_slots - resident * plan.model.expert_count
    return round(slots * len(experts) / (len(experts) - resident))


def evened_slots(plan: Plan) -> int:
    """The slots that experts share, as if all layers had them; 0 where there are none."""
    experts = {p.layer: p.device for p in plan.placements if p.kind is UnitKind.EXPERTS}
    routed_there = {p.layer for p in plan.placements if p.kind is UnitKind.ROUTER and p.device is Device.GPU}
    resident = sum(device is Device.GPU for device in experts.values())
    sharing = sum(device is Device.CPU and layer in routed_there for layer, device in experts.items())
    slots = plan.settings.gpu_slots - resident * plan.model.expert_count
    return round(slots * len(experts) / sharing) if sharing else 0
