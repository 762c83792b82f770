"""Models as placement problems: what every item holds, costs and may do."""

from dataclasses import replace

import pytest

from offload.tiers import Device, Tier
from planner.items import EXPERT_CLASSES, expert_classes, placement_problem
from planner.machine_files import load_machine
from planner.model_shape import ModelShape, UnitKind
from planner.placement import PlacementProblem
from planner.plan import Objective, Settings, WeightsForm
from planner.unit_cost import Share, cpu_attention_seconds, cpu_seconds, experts
from tests.support.shapes import SHAPES

DENSE, MIXTURE = SHAPES["dense 1B"], SHAPES["OLMoE 7B, 1B active"]
LAPTOP = load_machine("laptop")
PLACES = frozenset((tier, device) for tier in Tier for device in Device if (tier, device) != (Tier.GPU, Device.CPU))
SETTINGS = Settings(4096, 512, 4, WeightsForm.PACKED, "float16", "simulated", "gpu")


def problem(shape: ModelShape, *, ram: int = 1 << 40, objective: Objective = Objective.LATENCY) -> PlacementProblem:
    return placement_problem(
        shape, LAPTOP, SETTINGS, objective=objective, ram_bytes=ram, gpu_bytes=4 << 30, tiers=PLACES
    )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_every_byte_has_a_place(shape: ModelShape) -> None:
    in_ram = [
        next(o for o in item.options if (o.tier, o.device) == (Tier.RAM, Device.CPU)) for item in problem(shape).items
    ]
    held = sum(option.ram_bytes for option in in_ram)
    whole = shape.num_bytes + shape.kv_bytes_per_token * 4096
    assert whole - len(in_ram) <= held <= whole


def test_flash_only_where_ram_is_short() -> None:
    assert all(option.tier is not Tier.FLASH for item in problem(DENSE).items for option in item.options)
    short = problem(DENSE, ram=1 << 29)
    assert short.ram_bytes < 1 << 29, "buffers for what is on its way"
    on_flash = [(item.kind, option) for item in short.items for option in item.options if option.tier is Tier.FLASH]
    assert on_flash
    assert all(option.ram_bytes == 0 for kind, option in on_flash if kind is not UnitKind.KV)


def test_old_tokens_of_a_cache_may_lie_on_flash() -> None:
    """Of 4096 tokens half; in the middle of the context nothing is read yet."""
    read = {}
    for context in (2048, 4096, 65536):
        settings = replace(SETTINGS, context_tokens=context)
        given = {"objective": Objective.LATENCY, "ram_bytes": 1 << 29, "gpu_bytes": 4 << 30, "tiers": PLACES}
        found = placement_problem(DENSE, LAPTOP, settings, **given)
        caches = [item for item in found.items if item.kind is UnitKind.KV]
        spilled = [option for item in caches for option in item.options if option.tier is Tier.FLASH]
        assert {option.device for option in spilled} <= {Device.CPU}
        assert all(option.ram_bytes == DENSE.kv_bytes_per_layer[0] * 2048 for option in spilled)
        read[context] = {option.load_bytes for option in spilled}
    assert read == {2048: set(), 4096: {0}, 65536: {DENSE.kv_bytes_per_layer[0] * (32768 - 2048)}}


def test_loads_split_over_flash_and_link() -> None:
    loads = [
        option
        for item in problem(DENSE, ram=1 << 29).items
        for option in item.options
        if option.tier is Tier.FLASH and option.device is Device.GPU and option.load_bytes
    ]
    assert loads
    assert all(0 < option.link_s < option.load_s for option in loads)


def test_a_machine_without_gpu_offers_none() -> None:
    machine = load_machine("laptop-no-gpu")
    found = placement_problem(
        DENSE, machine, SETTINGS, objective=Objective.LATENCY, ram_bytes=1 << 40, gpu_bytes=0, tiers=PLACES
    )
    assert {option.device for item in found.items for option in item.options} == {Device.CPU}
    assert found.handover_s == 0


def test_a_tied_head_on_the_gpu_brings_its_own_copy() -> None:
    *units, output = DENSE.units
    tied = replace(DENSE, units=(*units, replace(output, num_bytes=0)))
    item = next(item for item in problem(tied).items if item.kind is UnitKind.OUTPUT)
    on_gpu = next(option for option in item.options if option.tier is Tier.GPU)
    assert on_gpu.gpu_bytes == output.active_bytes


def test_popular_experts_save_more() -> None:
    routed = [item for item in problem(MIXTURE).items if item.layer == 0 and item.routed]
    assert len(routed) == EXPERT_CLASSES
    seconds = [item.options[-1].compute_s for item in routed]
    assert seconds == sorted(seconds, reverse=True)


@pytest.mark.parametrize(("count", "used"), [(64, 8), (128, 8), (4, 2), (3, 3), (1, 1)])
def test_classes_use_as_many_experts_as_a_token(count: int, used: int) -> None:
    classes = expert_classes(count, used)
    assert sum(number for number, _ in classes) == count
    expected = sum(number * probability for number, probability in classes)
    assert expected <= used + 1e-9
    assert expected == pytest.approx(used, rel=0.15)
    assert all(0 < probability <= 1 for _, probability in classes)


def test_experts_of_many_tokens() -> None:
    assert experts(1, 0.25).bytes == pytest.approx(0.25)
    assert experts(1, 0.25).tokens == pytest.approx(1.0)
    many = experts(1000, 0.25)
    assert many.bytes == pytest.approx(1.0)
    assert many.tokens == pytest.approx(250)


def test_more_tokens_never_cost_less() -> None:
    sizes = {"Q4_0": 1e8}
    times = [cpu_seconds(LAPTOP.cpu, 4, sizes, Share(1.0, tokens), 4) for tokens in (1, 2, 8, 9, 32, 128, 512)]
    assert times == sorted(times)
    assert times[-1] > 2 * times[-2]


def test_unknown_types_cost_as_float32() -> None:
    one, other = (cpu_seconds(LAPTOP.cpu, 4, {name: 1e8}, Share(1.0, 1), 1) for name in ("F32", "I64"))
    assert one == other


def test_attention_grows_with_depth() -> None:
    times = [cpu_attention_seconds(LAPTOP.cpu, 4, DENSE, 0, 1, depth) for depth in (0, 1000, 30000)]
    assert times == sorted(times)
    assert cpu_attention_seconds(LAPTOP.cpu, 4, DENSE, 0, 512, 0) > times[0]


def test_objectives_look_at_different_steps() -> None:
    token, chunk, batch = (
        sum(item.options[-1].compute_s for item in problem(MIXTURE, objective=objective).items)
        for objective in (Objective.LATENCY, Objective.TTFT, Objective.THROUGHPUT)
    )
    assert token < batch < chunk


def test_buffers_for_loads_to_the_gpu_are_shared() -> None:
    options = [option for item in problem(MIXTURE).items for option in item.options]
    loaded = [option for option in options if option.device is Device.GPU and option.tier is not Tier.GPU]
    assert loaded
    assert all(option.gpu_bytes == 0 for option in loaded)
    still = placement_problem(
        MIXTURE,
        LAPTOP,
        SETTINGS,
        objective=Objective.LATENCY,
        ram_bytes=1 << 40,
        gpu_bytes=4 << 30,
        tiers=frozenset({(Tier.GPU, Device.GPU), (Tier.RAM, Device.CPU)}),
    )
    assert problem(MIXTURE).gpu_bytes < still.gpu_bytes == 4 << 30
    routed = placement_problem(
        MIXTURE,
        LAPTOP,
        SETTINGS,
        objective=Objective.LATENCY,
        ram_bytes=1 << 40,
        gpu_bytes=4 << 30,
        tiers=PLACES,
        loads_dense=False,
    )
    assert problem(MIXTURE).gpu_bytes < routed.gpu_bytes < still.gpu_bytes
    assert {item.routed for item in routed.items for option in item.options if option.load_bytes} == {True}
