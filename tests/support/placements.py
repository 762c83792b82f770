"""Random placement problems with an assignment each, for hypothesis."""

from dataclasses import dataclass

from hypothesis import strategies as st

from offload.tiers import Device, Tier
from planner.model_shape import UnitKind
from planner.placement import Assignment, Item, Option, PlacementProblem

_SECONDS = st.one_of(st.just(0.0), st.floats(1e-7, 10.0), st.sampled_from([0.25, 0.5, 1.0]))


@dataclass(frozen=True, slots=True)
class Placed:
    """A problem and one option of each of its items."""

    problem: PlacementProblem
    assignment: Assignment


@st.composite
def options(draw: st.DrawFn) -> Option:
    """An option of any tier and device."""
    tier, device = draw(st.sampled_from(Tier)), draw(st.sampled_from(Device))
    resident = tier.value == device.value or (tier is Tier.RAM and device is Device.CPU)
    load_s = 0.0 if resident else draw(_SECONDS)
    both = tier is Tier.FLASH and device is Device.GPU
    link_s = load_s * draw(st.floats(0.0, 1.0)) if both else 0.0
    return Option(tier, device, draw(_SECONDS), load_s, int(1e6 * load_s), 0, 0, link_s)


@st.composite
def placed(draw: st.DrawFn) -> Placed:
    """Up to five layers of a router's items and routed ones, with something before and behind them."""
    items: list[Item] = [Item("embedding", UnitKind.EMBEDDING, None, (draw(options()),))]
    for layer in range(draw(st.integers(0, 5))):
        items += [
            Item(f"blk.{layer}.{part}", UnitKind.ATTENTION, layer, (draw(options()), draw(options())))
            for part in range(draw(st.integers(1, 2)))
        ]
        items += [
            Item(f"blk.{layer}.experts#{part}", UnitKind.EXPERTS, layer, (draw(options()),), routed=True)
            for part in range(draw(st.integers(0, 3)))
        ]
    items.append(Item("output", UnitKind.OUTPUT, None, (draw(options()),)))
    problem = PlacementProblem(tuple(items), 0, 0, draw(_SECONDS))
    return Placed(problem, tuple(draw(st.integers(0, len(item.options) - 1)) for item in items))
