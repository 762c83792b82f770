"""How many sequences a plan answers together: those that make tokens cheaper, and find room."""

from dataclasses import replace

import pytest

from offload.gguf import GGUFFile
from planner.hit_curve import assumed_curve
from planner.machine import Flash, FlashPoint
from planner.parallel import COUNTS, best_parallel, parallel_here
from planner.plan import Settings, WeightsForm
from planner.solve import plan_here
from planner.streamed import Streaming, hit_curve
from runtime.models import DEMO_MODEL
from tests.support.planning import profile
from tests.support.shapes import SHAPES

OLMOE, DENSE_1B = SHAPES["OLMoE 7B, 1B active"], SHAPES["dense 1B"]
FLASH = Flash("drive", (FlashPoint(1 << 20, 4, True, 4e9),), 0.0, 0)
STREAMED = Settings(1 << 15, 256, 2, WeightsForm.PACKED, "program", "cpu", stream_slots=325)
IN_RAM = replace(STREAMED, stream_slots=0)
EXPERTS = Streaming(FLASH, assumed_curve(16, 64, 8, popularity_exponent=0.0))


def test_what_is_read_from_flash_serves_as_many_as_can_be() -> None:
    assert best_parallel(OLMOE, profile(), STREAMED, 256, EXPERTS) == COUNTS[-1]
    layers = Streaming(FLASH, hit_curve(DENSE_1B))
    assert best_parallel(DENSE_1B, profile(), replace(STREAMED, stream_slots=4), 256, layers) == COUNTS[-1]


def test_a_dense_model_in_ram_is_bound_by_arithmetic_sooner() -> None:
    assert 1 < best_parallel(DENSE_1B, profile(), IN_RAM, 256, None) < COUNTS[-1]


@pytest.mark.parametrize(("context", "most"), [(100, 1), (1100, 4), (4096, 16), (4095, 8)])
def test_kv_rows_limit_it(context: int, most: int) -> None:
    assert best_parallel(OLMOE, profile(), replace(STREAMED, context_tokens=context), 256, EXPERTS) == most


def test_slots_limit_it() -> None:
    assert best_parallel(OLMOE, profile(), replace(STREAMED, stream_slots=35), 256, EXPERTS) == 4


def test_a_plan_for_this_machine_says_it() -> None:
    with GGUFFile.open(DEMO_MODEL) as gguf:
        plan = plan_here(gguf, context_tokens=1024, threads=1)
        assert parallel_here(plan, gguf, 256) in (1, 2, 4)
        others = replace(plan, settings=replace(plan.settings, loop="sequential"))
        assert parallel_here(others, gguf, 256) == 8
