"""What another machine, type or context would change: told only where it is so."""

from dataclasses import replace

import pytest

from planner.budget import GIB, Budget
from planner.machine import Machine
from planner.plan import Plan
from planner.prediction import Residual
from planner.question import Here, Question, Wish, ask
from planner.solve import solve
from planner.what_if import Alternative, as_type, best_help, what_if
from tests.support.machines import budget_of, machine
from tests.support.planning import HeaderOnly, header, llama_8b, profile


def here(model: HeaderOnly, wish: Wish | None = None, ram_bytes: int = 16 * GIB) -> Question:
    place = Here(profile(threads=4))
    return ask(model, Budget(ram_bytes, 0, "test", "no GPU"), place, wish or Wish())  # type: ignore[arg-type]


def described(model: HeaderOnly, on: Machine) -> Question:
    return ask(model, budget_of(on), on, Wish(context_tokens=512))  # type: ignore[arg-type]


def alternatives(question: Question) -> tuple[Plan, dict[str, Alternative]]:
    plan = solve(question)
    return plan, {one.change: one for one in what_if(question, plan)}


def test_more_ram_is_no_help_where_everything_is_in_ram() -> None:
    question = here(llama_8b())
    plan, found = alternatives(question)
    assert found["2.0 GiB more RAM"].decode_tokens_per_s == plan.predicted.decode_tokens_per_s
    assert best_help(question, plan) is None


def test_more_ram_helps_where_flash_is_read() -> None:
    on = machine(ram_bytes=4 * GIB)
    question = described(llama_8b(), on)
    plan = solve(question)
    best = best_help(question, plan)
    assert best is not None
    assert best.change == "2.0 GiB more RAM"
    assert (best.decode_tokens_per_s or 0) > 1.05 * plan.predicted.decode_tokens_per_s


def test_more_gpu_memory() -> None:
    model = header(layers=8, width=4096, heads=32, kv_heads=8, ffn=14336, vocab=128256, weights="Q8_0")
    question = described(model, machine(ram_bytes=16 * GIB, gpu_bytes=2 * GIB))
    plan = solve(question)
    best = best_help(question, plan)
    assert best is not None
    assert best.change == "2.0 GiB more GPU memory"


def test_threads_only_where_the_user_held_them_back() -> None:
    _, free = alternatives(here(llama_8b()))
    assert "3 threads" in free
    assert "5 threads" not in free
    question = here(llama_8b(), Wish(threads=3))
    plan, held = alternatives(question)
    assert {"2 threads", "4 threads"} <= held.keys()
    best = best_help(question, plan)
    assert best is not None
    assert best.change == "4 threads"
    small = here(header(), Wish(threads=1))
    assert "2 threads" not in alternatives(small)[1]


def test_neighbouring_quant_types() -> None:
    plan, found = alternatives(here(llama_8b("Q4_K")))
    slower, faster = found["as Q4_K_M"], found["as Q3_K_M"]
    assert (slower.decode_tokens_per_s or 0) < plan.predicted.decode_tokens_per_s < (faster.decode_tokens_per_s or 0)
    assert (faster.peak_ram_bytes or 0) < plan.predicted.peak_ram_bytes


@pytest.mark.parametrize(("name", "bits"), [("Q8_0", 8.5), ("Q4_K_M", 4.9), ("Q2_K", 3.2)])
def test_a_type_scales_the_bytes(name: str, bits: float) -> None:
    question = as_type(here(llama_8b("F16")), name)
    assert question.bits_per_weight == pytest.approx(bits, rel=0.01)
    assert solve(question).needs.ram.weights_bytes == pytest.approx(question.shape.num_parameters * bits / 8, rel=0.01)


def test_contexts_within_the_training() -> None:
    plan, found = alternatives(here(llama_8b(), Wish(context_tokens=4096)))
    assert (found["context of 2048 tokens"].peak_ram_bytes or 0) < plan.predicted.peak_ram_bytes
    assert (found["context of 8192 tokens"].peak_ram_bytes or 0) > plan.predicted.peak_ram_bytes
    assert "context of 16384 tokens" not in alternatives(here(llama_8b(), Wish(context_tokens=8192)))[1]


def test_what_does_not_fit_has_no_speed() -> None:
    model, wish = llama_8b("Q4_K"), Wish(context_tokens=4096, loop="sequential")
    needed = solve(here(model, wish, ram_bytes=8 << 30)).needs.ram.needed_bytes
    _, found = alternatives(here(model, wish, ram_bytes=needed))
    assert found["context of 8192 tokens"].decode_tokens_per_s is None
    assert found["as Q4_K_M"].decode_tokens_per_s is None


def test_corrections_are_the_same_on_both_sides() -> None:
    corrected = replace(profile(threads=4), residuals={"decode/program/packed/cpu/RAM bandwidth": Residual(1.6, 9)})
    question = here(llama_8b(), Wish(threads=2))
    learned = replace(question, place=Here(corrected))  # type: ignore[arg-type]
    (_, plain), (_, found) = alternatives(question), alternatives(learned)
    for change, one in found.items():
        other = plain[change].decode_tokens_per_s or 0
        assert (one.decode_tokens_per_s or 0) == pytest.approx(other / 1.6)
