"""What passes over several tokens cost, what turns with drafts promise, and what is learned of them."""

from dataclasses import replace
from itertools import pairwise

import pytest

from planner.budget import Budget
from planner.draft_depth import Costs, best_depth
from planner.drafts import best_turn, learned_acceptance, pass_ratios, record_acceptance
from planner.gpu_choice import chosen_gpu
from planner.profile import load_or_measure
from planner.question import Here, Wish, ask
from planner.solve import solve
from planner.ways import HYBRID
from tests.support import planning

GIB = 1 << 30
SIMULATED = "sim:vram=64MiB,bw=400GB/s,link=10GB/s,tflops=10"
ROUTED = planning.header(layers=4, width=1024, ffn=2048, experts=32, used=4, vocab=32000)


@pytest.mark.parametrize(("place", "ram_bytes"), [("ram", 8 * GIB), ("hybrid", 8 * GIB), ("streamed", GIB // 2)])
def test_a_pass_over_more_tokens_never_costs_less_and_loads_the_union_of_experts_once(place, ram_bytes):
    gpu = chosen_gpu(SIMULATED) if place == "hybrid" else None
    budget = Budget(ram_bytes, (64 << 20) if gpu else 0, "given", "given")
    wish = Wish(1024, 2, loop=HYBRID if gpu else "auto")
    question = ask(ROUTED, budget, Here(planning.profile(), gpu), wish)
    plan = solve(question)
    assert bool(plan.settings.stream_slots) == (place == "streamed")
    ratios = pass_ratios(question, plan, 17)
    assert ratios[0] == 1.0
    assert all(one <= other for one, other in pairwise(ratios))
    assert 1.2 < ratios[-1] < 17
    if place == "streamed":
        assert ratios[3] > 2  # experts that four tokens use come from flash


def test_a_turn_is_that_of_the_cost_model_where_devices_are_shared():
    for acceptance in (0.0, 0.4, 0.7, 0.95):
        costs = Costs(0.1, 0.0, lambda tokens: 1 + 0.05 * (tokens - 1), 1.0)
        depth = best_depth([acceptance] * 16, costs)
        assert best_turn(acceptance, 0.1, costs.verify_s, 16, apart=False) == (
            depth.drafts,
            pytest.approx(depth.tokens_per_s),
        )


def test_drafts_of_an_own_device_hide_behind_the_passes_they_foresaw():
    def verify_s(tokens):
        return 1 + 0.05 * (tokens - 1)

    shared = best_turn(0.9, 0.1, verify_s, 8, apart=False)
    apart = best_turn(0.9, 0.1, verify_s, 8, apart=True)
    assert apart[1] > shared[1]
    assert best_turn(1.0, 0.1, verify_s, 8, apart=True)[1] == pytest.approx(9 / verify_s(9))
    assert best_turn(0.9, 5.0, verify_s, 8, apart=True) == (0, 1.0)


def test_what_runs_tell_of_acceptance_is_kept_by_target_and_draft():
    assert record_acceptance("big", "small", 0.8).acceptances["big|small"].runs == 1
    record_acceptance("big", "small", 0.6)
    learned = learned_acceptance(load_or_measure(), "big", "small")
    assert learned is not None
    assert (learned.rate, learned.runs) == (pytest.approx(0.7), 2)
    assert learned_acceptance(load_or_measure(), "big", "other") is None
    assert learned_acceptance(replace(load_or_measure(), acceptances={}), "big", "small") is None
    with pytest.raises(ValueError, match=r"acceptance of 1\.5"):
        record_acceptance("big", "small", 1.5)
