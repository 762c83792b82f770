"""When the tasks of a schedule run, what binds, and the traces written of it."""

import json
import math
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import RequestError
from offload.tiers import Device, Tier
from planner.model_shape import UnitKind
from planner.placement import Item, Option, PlacementProblem
from planner.schedule import Lane, Task, schedule
from planner.simulate import Timeline, simulate, step_seconds, write_trace
from tests.support.placements import Placed, placed

# Two loads of 3 s beside computations of 1 s: the drive is busy throughout, the CPU waits for it.
STREAM = (
    Task("load a", Lane.FLASH, 3.0),
    Task("a", Lane.CPU, 1.0, (0,)),
    Task("load b", Lane.FLASH, 3.0),
    Task("b", Lane.CPU, 1.0, (1, 2)),
)


@st.composite
def task_lists(draw: st.DrawFn) -> tuple[Task, ...]:
    tasks: list[Task] = []
    for index in range(draw(st.integers(0, 25))):
        after = draw(st.lists(st.integers(0, index - 1), max_size=3)) if index else []
        seconds = draw(st.one_of(st.sampled_from([0.0, 1.0, 2.0]), st.floats(0, 5)))
        tasks.append(Task(str(index), draw(st.sampled_from(Lane)), seconds, tuple(after)))
    return tuple(tasks)


def check(timeline: Timeline) -> None:
    """What holds for every timeline."""
    tasks = timeline.tasks
    for lane in Lane:
        spans = sorted((s, e) for t, s, e in zip(tasks, timeline.start, timeline.end, strict=True) if t.lane is lane)
        assert all(first[1] <= second[0] for first, second in pairwise(spans))
    chain = [0.0] * len(tasks)
    for index, task in enumerate(tasks):
        assert timeline.end[index] == timeline.start[index] + task.seconds
        assert all(timeline.end[before] <= timeline.start[index] for before in task.after)
        chain[index] = task.seconds + max((chain[before] for before in task.after), default=0.0)
    slack = 1e-9 * (1 + timeline.seconds)
    assert timeline.seconds >= max(timeline.busy.values()) - slack
    assert timeline.seconds >= max(chain, default=0.0) - slack
    assert timeline.seconds <= sum(task.seconds for task in tasks) + slack  # some lane is always busy
    path = timeline.critical_path()
    assert [timeline.start[index] for index in path[1:]] == [timeline.end[index] for index in path[:-1]]
    assert sum(timeline.critical_seconds().values()) == pytest.approx(timeline.seconds)


def test_a_stream_is_bound_by_its_loads():
    timeline = simulate(STREAM)
    assert timeline.start == (0.0, 3.0, 3.0, 6.0)
    assert timeline.end == (3.0, 4.0, 6.0, 7.0)
    assert timeline.seconds == 7.0
    assert timeline.busy == {Lane.GPU: 0.0, Lane.LINK: 0.0, Lane.CPU: 2.0, Lane.FLASH: 6.0}
    assert timeline.critical_path() == (0, 2, 3)
    assert timeline.critical_seconds()[Lane.FLASH] == 6.0
    assert timeline.critical_lane is Lane.FLASH
    check(timeline)


def test_a_free_lane_takes_the_first_that_is_ready():
    tasks = (
        Task("router", Lane.CPU, 2.0),
        Task("load routed", Lane.FLASH, 1.0, (0,)),
        Task("load later", Lane.FLASH, 1.0),
        Task("load last", Lane.FLASH, 5.0),
    )
    assert simulate(tasks).start == (0.0, 6.0, 0.0, 1.0)  # what is ready is not kept waiting for what comes before it
    assert simulate((*tasks[:3], Task("load last", Lane.FLASH, 1.0), Task("more", Lane.FLASH, 1.0))).start[1] == 2.0


def test_tasks_without_duration():
    timeline = simulate(tuple(Task(str(index), Lane.CPU, 0.0, (index - 1,) if index else ()) for index in range(5)))
    assert timeline.seconds == 0.0
    assert timeline.critical_path() == (0,)
    check(timeline)
    assert simulate(()).seconds == 0.0
    assert "bound by" in simulate(()).summary()


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Task("a", Lane.CPU, -1.0), r"task 0 \(a\) takes -1.0 seconds"),
        (Task("a", Lane.CPU, math.nan), "takes nan seconds"),
        (Task("a", Lane.CPU, math.inf), "takes inf seconds"),
        (Task("a", Lane.CPU, 1.0, (0,)), "waits for a task that does not stand before it"),
        (Task("a", Lane.CPU, 1.0, (-1,)), "waits for a task that does not stand before it"),
    ],
)
def test_impossible_tasks(task: Task, message: str):
    with pytest.raises(ValueError, match=message):
        simulate((task,))


@settings(max_examples=150, deadline=None)
@given(task_lists())
def test_every_timeline(tasks: tuple[Task, ...]):
    timeline = simulate(tasks)
    check(timeline)
    assert simulate(tasks) == timeline
    json.loads(timeline.to_chrome_trace())


@settings(max_examples=80, deadline=None)
@given(placed())
def test_every_step(case: Placed):
    timeline = simulate(schedule(case.problem, case.assignment))
    check(timeline)
    assert step_seconds(case.problem, case.assignment) == timeline.seconds
    chosen = case.problem.chosen(case.assignment)
    assert timeline.seconds >= max(option.load_s + option.compute_s for option in chosen) - 1e-9


@settings(max_examples=60, deadline=None)
@given(placed(), st.floats(1.0, 8.0))
def test_a_step_scales_with_its_times(case: Placed, factor: float):
    """Order and dependencies do not depend on the times' unit; powers of two keep the arithmetic exact."""
    scale = 2.0 ** round(factor)
    items = tuple(
        Item(item.name, item.kind, item.layer, tuple(_scaled(option, scale) for option in item.options), item.routed)
        for item in case.problem.items
    )
    problem = PlacementProblem(items, 0, 0, scale * case.problem.handover_s)
    assert step_seconds(problem, case.assignment) == scale * step_seconds(case.problem, case.assignment)


def _scaled(option: Option, scale: float) -> Option:
    times = (scale * option.compute_s, scale * option.load_s)
    return Option(option.tier, option.device, *times, option.load_bytes, 0, 0, scale * option.link_s)


def test_streaming_hides_behind_computing():
    """Of 50 layers that load for 1 s and compute for 1 s, only the first load is exposed."""
    option = Option(Tier.FLASH, Device.CPU, 1.0, 1.0, 1, 0, 0)
    items = tuple(Item(str(layer), UnitKind.DENSE_FFN, layer, (option,)) for layer in range(50))
    problem = PlacementProblem(items, 0, 0, 0.0)
    assert step_seconds(problem, (0,) * 50) == 51.0
    one_buffer = simulate(schedule(problem, (0,) * 50, layers_ahead=1))
    assert one_buffer.seconds == 100.0


def test_adversarial_drives():
    """A drive far below 50 MB/s binds, and one that is instant does not."""
    slow = Option(Tier.FLASH, Device.GPU, 1e-4, 1e4, 1, 0, 0, 1e-3)
    timeline = simulate(schedule(_one_item_layers(slow), (0,) * 8))
    assert timeline.critical_lane is Lane.FLASH
    assert timeline.seconds == pytest.approx(8e4)
    fast = Option(Tier.FLASH, Device.CPU, 1.0, 1e-12, 1, 0, 0)
    assert simulate(schedule(_one_item_layers(fast), (0,) * 8)).critical_lane is Lane.CPU


def _one_item_layers(option: Option) -> PlacementProblem:
    items = tuple(Item(f"blk.{layer}", UnitKind.DENSE_FFN, layer, (option,)) for layer in range(8))
    return PlacementProblem(items, 0, 0, 1e-5)


def test_fast_enough_for_solvers():
    """Under 20 ms for 100 layers of 12 items, by CPU time and the best of five."""
    if sys.gettrace() is not None:
        pytest.skip("every line is traced: too slow to be timed")
    options = (
        Option(Tier.RAM, Device.CPU, 1e-3, 0.0, 0, 0, 0),
        Option(Tier.FLASH, Device.GPU, 1e-4, 3e-3, 1, 0, 0, 1e-3),
    )
    items = tuple(
        Item(f"blk.{layer}.{part}", UnitKind.EXPERTS, layer, options, routed=part > 3)
        for layer in range(100)
        for part in range(12)
    )
    problem = PlacementProblem(items, 0, 0, 1e-5)
    assignment = tuple(index % 2 for index in range(len(items)))
    times = []
    for _ in range(5):
        begin = time.process_time()
        step_seconds(problem, assignment)
        times.append(time.process_time() - begin)
    assert min(times) < 0.02


def test_the_chrome_trace_has_lanes_as_threads_and_microseconds():
    trace = json.loads(simulate(STREAM).to_chrome_trace())
    names = {event["tid"]: event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"}
    assert sorted(names.values()) == ["cpu", "flash", "gpu", "link"]
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert [(names[event["tid"]], event["name"], event["ts"], event["dur"]) for event in events] == [
        ("flash", "load a", 0.0, 3e6),
        ("cpu", "a", 3e6, 1e6),
        ("flash", "load b", 3e6, 3e6),
        ("cpu", "b", 6e6, 1e6),
    ]


def test_a_trace_is_written(tmp_path: Path):
    write_trace(simulate(STREAM), tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["traceEvents"]
    with pytest.raises(RequestError, match="the trace cannot be written: No such file or directory"):
        write_trace(simulate(STREAM), tmp_path / "nowhere" / "out.json")


def test_the_summary_says_what_binds():
    assert simulate(STREAM).summary().splitlines() == [
        "4 tasks in 7000.000 ms",
        "lane     busy  critical",
        "gpu      0.0%      0.0%",
        "link     0.0%      0.0%",
        "cpu     28.6%     14.3%",
        "flash   85.7%     85.7%",
        "bound by flash",
    ]
