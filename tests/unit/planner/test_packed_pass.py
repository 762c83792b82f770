"""What a pass over packed weights takes: the sum of its units, with what of it experts take."""

from dataclasses import replace

import pytest

from planner import unit_cost
from planner.machine_here import cpu_here
from planner.model_shape import ModelShape, UnitKind
from planner.packed_pass import pass_seconds
from planner.plan import Settings, WeightsForm
from tests.support.planning import header, olmoe, profile

SETTINGS = Settings(4096, 512, 4, WeightsForm.PACKED, "program", "cpu")


def shape_of(model: object) -> ModelShape:
    return ModelShape.from_gguf(model)  # type: ignore[arg-type]


def test_layers_that_are_alike_take_as_long() -> None:
    one, two = (shape_of(header(layers=layers, width=1024, heads=8, kv_heads=8)) for layers in (1, 2))
    ends = replace(one, units=tuple(unit for unit in one.units if unit.layer is None))
    alone, longer, rest = (pass_seconds(shape, profile(), SETTINGS, 64, 512)[0] for shape in (one, two, ends))
    assert longer - rest == pytest.approx(2 * (alone - rest))


def test_layers_that_differ_do_not() -> None:
    shape = shape_of(header(layers=2, width=1024, heads=8, kv_heads=8))
    wider = replace(shape, kv_bytes_per_layer=(shape.kv_bytes_per_layer[0], 10 * shape.kv_bytes_per_layer[1]))
    depth, cpu = 100_000, cpu_here(profile())
    seconds = [unit_cost.cpu_attention_seconds(cpu, 4, wider, layer, 1, depth) for layer in (0, 1)]
    plain, more = (pass_seconds(one, profile(), SETTINGS, 1, depth)[0] for one in (shape, wider))
    assert more - plain == pytest.approx(seconds[1] - seconds[0])


def test_what_experts_take_of_it() -> None:
    shape = shape_of(olmoe())
    without = replace(shape, units=tuple(unit for unit in shape.units if unit.kind is not UnitKind.EXPERTS))
    seconds, experts_s = pass_seconds(shape, profile(), SETTINGS, 128, 1000)
    assert experts_s > seconds / 2
    assert pass_seconds(without, profile(), SETTINGS, 128, 1000) == (pytest.approx(seconds - experts_s), 0.0)


def test_logits_of_every_token_take_longer() -> None:
    shape = shape_of(header(vocab=100_000))
    one, every = (pass_seconds(shape, profile(), SETTINGS, 64, 0, logits=logits)[0] for logits in (1, 64))
    assert every > one
