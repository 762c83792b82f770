"""The draft that a plan chooses: source, device and depth, within the memory that target and draft share."""

from dataclasses import replace

import pytest

from planner.budget import Budget
from planner.draft_choice import AllowedDraft, DraftWish, left_over, own_plan, with_draft
from planner.gpu_choice import chosen_gpu
from planner.model_shape import ModelShape
from planner.plan import Plan
from planner.planned_draft import DraftKind, LearnedAcceptance
from planner.question import Here, Wish, ask, planned_model
from planner.solve import solve, solve_with_drafts
from planner.ways import PROGRAM
from tests.support import planning

GIB, MIB = 1 << 30, 1 << 20
WEAK = "sim:vram=1GiB,bw=60GB/s,link=10GB/s,tflops=2"
TARGET = planning.llama_8b("Q4_0")
SMALL = planning.header(layers=2, width=1024, heads=16, kv_heads=4, ffn=2816, vocab=128256, tied=True, weights="Q4_0")


def allowed(header=SMALL, name="small.gguf"):
    shape = ModelShape.from_gguf(header, Wish().kv)
    model = replace(planned_model(header, shape), path=name)
    return AllowedDraft(name, name, model, shape)


def asked(ram_bytes=16 * GIB, gpu=None, profile=None, loop="auto"):
    found = None if gpu is None else chosen_gpu(gpu)
    budget = Budget(ram_bytes, found.free_bytes if found else 0, "given", "given", 256 * MIB, 0)
    return ask(TARGET, budget, Here(profile or planning.profile(), found), Wish(2048, 4, loop=loop))


def wish(**options):
    return DraftWish(**{"sources": (allowed(),), "looks_up": False, "most": 8} | options)


def test_a_draft_that_pays_is_planned_with_what_it_takes_and_brings():
    question = asked()
    plan = solve_with_drafts(question, wish())
    draft = plan.draft
    assert draft is not None
    assert (draft.kind, draft.device, draft.acceptance_source) == (DraftKind.MODEL, "cpu", "assumed")
    assert draft.depth >= 2
    assert draft.gain > 1.1
    assert 50 * MIB < draft.ram_bytes < 600 * MIB
    assert plan.budget.ram_bytes == question.budget.ram_bytes - draft.ram_bytes
    assert plan.needs.ram.needed_bytes + draft.ram_bytes <= question.budget.ram_bytes
    assert draft.plain_tokens_per_s == solve(question).predicted.decode_tokens_per_s
    assert Plan.from_json(plan.to_json()) == plan
    assert "small.gguf on CPU, depth" in draft.lines()[0]
    assert "expected acceptance 0.6 (assumed)" in draft.lines()[0]
    assert "of RAM" in draft.lines()[1]


def test_what_was_learned_is_expected():
    question = asked()
    key = f"{question.model.key}|{allowed().key}"
    for rate, runs, said in ((0.9, 3, "learned from 3 runs"), (0.05, 1, "learned from 1 run")):
        profile = replace(planning.profile(), acceptances={key: LearnedAcceptance(rate, runs)})
        plan = solve_with_drafts(asked(profile=profile), wish())
        if rate > 0.5:
            assert plan.draft is not None
            assert (plan.draft.acceptance, plan.draft.acceptance_source) == (rate, said)
        else:
            assert plan.draft is not None
            assert plan.draft.kind is DraftKind.NONE
            assert said in plan.draft.lines()[0]


def test_the_better_of_two_sources_is_chosen():
    slow = allowed(planning.llama_8b("Q2_K"), "slow.gguf")
    plan = solve_with_drafts(asked(ram_bytes=64 * GIB), wish(sources=(slow, allowed())))
    assert plan.draft is not None
    assert plan.draft.name == "small.gguf"


def test_a_draft_that_displaces_more_than_it_brings_is_not_loaded():
    needed = solve(asked()).needs.ram.needed_bytes
    question = asked(ram_bytes=needed + 20 * MIB)  # the model fits whole, but not beside the draft
    plan = solve_with_drafts(question, wish(is_named=True))
    assert plan.draft is not None
    assert plan.draft.kind is DraftKind.NONE
    assert plan.draft.lines()[0].startswith("none; small.gguf")
    assert plan.settings.stream_slots == 0
    assert plan.budget == question.budget
    alone = solve_with_drafts(question, wish(is_named=True, looks_up=True))
    assert alone.draft is not None
    assert alone.draft.kind is DraftKind.LOOKUP
    assert "where the text repeats itself" in alone.draft.lines()[0]
    assert any("no draft model is loaded: small.gguf" in note for note in alone.notes)


def test_a_named_draft_that_displaces_nothing_is_loaded_to_be_tried():
    hopeless = {"acceptance": 0.01}
    assert solve_with_drafts(asked(), wish(**hopeless)).draft.kind is DraftKind.NONE
    tried = solve_with_drafts(asked(), wish(**hopeless, is_named=True)).draft
    assert tried is not None
    assert tried.depth == 0
    assert "to be tried: not expected to pay" in tried.lines()[0]
    assert solve_with_drafts(asked(), wish(**hopeless, is_forced=True)).draft is not None


def test_a_weak_gpu_drafts_for_the_cpu():
    plan = solve_with_drafts(asked(gpu=WEAK, loop=PROGRAM), wish(acceptance=0.7))
    draft = plan.draft
    assert draft is not None
    assert draft.device == WEAK
    assert plan.settings.device == "cpu"
    assert draft.gpu_bytes > 50 * MIB
    assert plan.budget.gpu_bytes == GIB - draft.gpu_bytes
    on_cpu = solve_with_drafts(asked(loop=PROGRAM), wish(acceptance=0.7)).draft
    assert on_cpu is not None
    assert draft.tokens_per_s > on_cpu.tokens_per_s
    assert "simulated GPU" in draft.lines()[0]


@pytest.mark.parametrize("vram", ["256MiB", "1GiB", "3GiB"])
def test_target_and_draft_share_the_memory_of_a_gpu(vram):
    question = asked(gpu=WEAK.replace("1GiB", vram))
    plan = solve_with_drafts(question, wish(acceptance=0.7, is_forced=True))
    draft = plan.draft
    assert draft is not None
    assert plan.needs.gpu.needed_bytes + draft.gpu_bytes <= question.budget.gpu_bytes
    assert plan.needs.ram.needed_bytes + draft.ram_bytes <= question.budget.ram_bytes
    assert draft.tokens_per_s >= solve(question).predicted.decode_tokens_per_s
    assert isinstance(question.place, Here)
    own = own_plan(allowed(), draft, plan, question.place)
    assert (own.settings.device == "cpu") == (draft.device == "cpu")
    assert own.settings.context_tokens == draft.context_tokens


def test_beside_a_fixed_plan_a_draft_takes_what_is_left():
    question = asked()
    plain = solve(question)
    plan = with_draft(question, plain, wish(), fixed=True)
    assert plan.draft is not None
    assert plan.placements == plain.placements
    assert plan.budget == plain.budget
    full = replace(plain, budget=replace(plain.budget, ram_bytes=plain.needs.ram.needed_bytes))
    assert left_over(full).ram_bytes == 0
    declined = with_draft(question, full, wish(is_forced=True), fixed=True).draft
    assert declined is not None
    assert declined.lines() == ["none; small.gguf and the model do not fit together"]


def test_a_head_needs_the_programs_hidden_states():
    head = AllowedDraft("head.npz", "head.npz", head_bytes=2 * 128256 * 4096 + (100 << 20))
    plan = solve_with_drafts(asked(), wish(sources=(head,), acceptance=0.7))
    assert plan.draft is not None
    assert plan.draft.kind is DraftKind.HEAD
    assert plan.draft.ram_bytes > GIB
    assert solve_with_drafts(asked(loop="sequential"), wish(sources=(head,), acceptance=0.7)).draft is None
