"""Which tasks a step has, in which order, and what each waits for."""

import pytest
from hypothesis import given, settings

from offload.tiers import Device, Tier
from planner.model_shape import UnitKind
from planner.placement import Item, Option, PlacementProblem
from planner.schedule import Lane, Task, schedule
from planner.simulate import simulate
from tests.support.placements import Placed, placed

CPU, GPU = Device.CPU, Device.GPU


def option(
    device: Device = CPU, compute_s: float = 1.0, load_s: float = 0.0, tier: Tier = Tier.RAM, link_s: float = 0.0
) -> Option:
    return Option(tier, device, compute_s, load_s, int(load_s * 100), 0, 0, link_s)


def streamed(load_s: float, compute_s: float = 1.0) -> Option:
    return option(CPU, compute_s, load_s, Tier.FLASH)


def problem(*items: tuple[str, int | None, Option, bool], handover_s: float = 0.5) -> PlacementProblem:
    made = tuple(
        Item(name, UnitKind.EXPERTS if routed else UnitKind.ATTENTION, layer, (choice,), routed)
        for name, layer, choice, routed in items
    )
    return PlacementProblem(made, 0, 0, handover_s)


def tasks_of(*items: tuple[str, int | None, Option, bool], **keywords: int) -> tuple[Task, ...]:
    made = problem(*items)
    return schedule(made, (0,) * len(items), **keywords)


def test_resident_items_follow_one_another():
    tasks = tasks_of(("a", None, option(), False), ("b", 0, option(), False), ("c", 0, option(), True))
    assert tasks == (Task("a", Lane.CPU, 1.0), Task("b", Lane.CPU, 1.0, (0,)), Task("c", Lane.CPU, 1.0, (1,)))


def test_nothing_to_do():
    assert schedule(PlacementProblem((), 0, 0, 0.1), ()) == ()


def test_a_change_of_device_is_handed_over_by_the_one_that_takes_over():
    tasks = tasks_of(("a", 0, option(CPU), False), ("b", 0, option(GPU), False), ("c", 1, option(CPU), False))
    assert tasks == (
        Task("a", Lane.CPU, 1.0),
        Task("hand over to gpu", Lane.GPU, 0.5, (0,)),
        Task("b", Lane.GPU, 1.0, (1,)),
        Task("hand over to cpu", Lane.CPU, 0.5, (2,)),
        Task("c", Lane.CPU, 1.0, (3,)),
    )


def test_loads_take_the_lanes_between_tier_and_device():
    from_ram = tasks_of(("a", 0, option(GPU, load_s=2.0), False))
    assert [(task.lane, task.seconds) for task in from_ram] == [(Lane.LINK, 2.0), (Lane.GPU, 1.0)]
    from_flash = tasks_of(("a", 0, streamed(3.0), False))
    assert [(task.lane, task.seconds) for task in from_flash] == [(Lane.FLASH, 3.0), (Lane.CPU, 1.0)]
    both = tasks_of(("a", 0, option(GPU, 1.0, 5.0, Tier.FLASH, link_s=2.0), False))
    assert both == (
        Task("load a", Lane.FLASH, 3.0),
        Task("copy a", Lane.LINK, 2.0, (0,)),
        Task("a", Lane.GPU, 1.0, (1,)),
    )


def test_loads_run_two_loading_layers_ahead():
    layers = [(f"{layer}{part}", layer, streamed(1.0), False) for layer in range(4) for part in "ab"]
    tasks = tasks_of(*layers)
    position = {task.name: index for index, task in enumerate(tasks)}
    starts = {task.name: task.after for task in tasks if task.lane is Lane.FLASH}
    assert starts["load 0a"] == starts["load 0b"] == starts["load 1a"] == starts["load 1b"] == ()
    assert starts["load 2a"] == starts["load 2b"] == (position["0b"],)
    assert starts["load 3b"] == (position["1b"],)
    assert [task.after for task in tasks_of(*layers, layers_ahead=4) if task.lane is Lane.FLASH] == [()] * 8
    alone = tasks_of(*layers, layers_ahead=1)
    assert alone[4].name == "load 1a"
    assert alone[4].after == (3,)


def test_resident_layers_take_no_buffer():
    layers = [(str(layer), layer, streamed(1.0) if layer % 2 else option(), False) for layer in range(6)]
    tasks = tasks_of(*layers)
    starts = {task.name: task.after for task in tasks if task.lane is Lane.FLASH}
    position = {task.name: index for index, task in enumerate(tasks)}
    assert starts == {"load 1": (), "load 3": (), "load 5": (position["1"],)}


def test_routed_loads_wait_for_the_router_and_residents_do_not_wait_for_them():
    tasks = tasks_of(
        ("router", 0, option(), False),
        ("cold", 0, streamed(3.0), True),
        ("hot", 0, option(), True),
        ("next", 1, option(), False),
    )
    assert tasks == (
        Task("router", Lane.CPU, 1.0),
        Task("load cold", Lane.FLASH, 3.0, (0,)),
        Task("cold", Lane.CPU, 1.0, (0, 1)),
        Task("hot", Lane.CPU, 1.0, (0,)),
        Task("next", Lane.CPU, 1.0, (2, 3)),
    )
    timeline = simulate(tasks)
    assert timeline.start == (0.0, 1.0, 4.0, 1.0, 5.0)
    assert timeline.seconds == 6.0


def test_routed_items_on_two_devices_share_one_hand_over_each_way():
    tasks = tasks_of(
        ("router", 0, option(CPU), False),
        ("#0", 0, option(GPU), True),
        ("#1", 0, option(CPU, 3.0), True),
        ("#2", 0, option(GPU), True),
        ("next", 1, option(CPU), False),
    )
    assert [task.name for task in tasks] == [
        "router", "hand over to gpu", "#0", "#1", "#2", "hand over to cpu", "next",
    ]  # fmt: skip
    assert [task.after for task in tasks] == [(), (0,), (1,), (0,), (1,), (2, 4), (3, 5)]
    assert simulate(tasks).seconds == 1.0 + 3.0 + 0.5 + 1.0  # the GPU's two are done beside the CPU's one


def test_routed_items_of_different_layers_are_not_joined():
    tasks = tasks_of(("a", 0, option(), True), ("b", 1, option(), True))
    assert tasks[1].after == (0,)


def test_what_cannot_be_scheduled():
    with pytest.raises(ValueError, match="layers_ahead is 0"):
        tasks_of(("a", 0, option(), False), layers_ahead=0)
    with pytest.raises(ValueError):
        schedule(problem(("a", 0, option(), False)), (0, 0))


@settings(max_examples=60, deadline=None)
@given(placed())
def test_what_holds_for_every_schedule(case: Placed):
    tasks = schedule(case.problem, case.assignment)
    assert all(before < index for index, task in enumerate(tasks) for before in task.after)
    names = [task.name for task in tasks]
    chosen = case.problem.chosen(case.assignment)
    computes = [names.index(item.name) for item in case.problem.items]
    assert computes == sorted(computes)
    for item, choice, index in zip(case.problem.items, chosen, computes, strict=True):
        assert tasks[index].lane.value == choice.device.value
        assert tasks[index].seconds == choice.compute_s
        assert (f"load {item.name}" in names) == (choice.load_s > 0)
    loaded = sum(task.seconds for task in tasks if task.lane in (Lane.FLASH, Lane.LINK))
    assert loaded == pytest.approx(sum(choice.load_s for choice in chosen))


@settings(max_examples=60, deadline=None)
@given(placed())
def test_never_more_layers_loaded_ahead_than_there_are_buffers(case: Placed):
    timeline = simulate(schedule(case.problem, case.assignment))
    when = {task.name: index for index, task in enumerate(timeline.tasks)}
    spans: list[tuple[int | None, float, float]] = []  # layer, first load begins, last computation ends
    for item, choice in zip(case.problem.items, case.problem.chosen(case.assignment), strict=True):
        if choice.load_s > 0 and not item.routed:
            start, end = timeline.start[when[f"load {item.name}"]], timeline.end[when[item.name]]
            if spans and item.layer is not None and spans[-1][0] == item.layer:
                _, first, last = spans.pop()
                start, end = min(first, start), max(last, end)
            spans.append((item.layer, start, end))
    assert all(later[1] >= earlier[2] for earlier, later in zip(spans, spans[2:], strict=False))


def test_what_is_outside_of_layers_has_its_own_buffer():
    tasks = tasks_of(
        ("embedding", None, streamed(1.0), False),
        ("a", 0, option(), False),
        ("output", None, streamed(1.0), False),
        layers_ahead=1,
    )
    assert [task.after for task in tasks if task.lane is Lane.FLASH] == [(), (1,)]
