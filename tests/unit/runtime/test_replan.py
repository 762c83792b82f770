"""What a run does about drift and short memory: on a stand-in for the executor, and on the built-in model."""

import logging
from dataclasses import replace

import numpy as np
import pytest

from offload.errors import PlanError
from offload.gguf import GGUFFile
from planner.budget import GIB, MIB
from planner.prediction import Measurement
from runtime.backend import make_executor
from runtime.drift import ROUNDS, TURN_TOKENS, WINDOW_TOKENS
from runtime.engine import Engine
from runtime.executor.base import Step
from runtime.generation import Request
from runtime.models import DEMO_MODEL
from runtime.replan import RETRY_TOKENS, Replanner
from runtime.sampler import SamplingParams

GREEDY = SamplingParams(temperature=0)
TRIAL_TOKENS = 2 * ROUNDS * TURN_TOKENS
MEASURED = Measurement(50.0, 80.0, 0.5, 1 << 20, 40)


class Executor:
    """Counts threads; an executor that can do nothing else."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.changes: list[int] = []

    def new_kv(self, capacity_tokens):
        raise NotImplementedError

    def forward(self, steps, *, logits="last"):
        raise NotImplementedError

    def close(self) -> None:
        pass

    def set_threads(self, threads: int) -> None:
        self.threads = threads
        self.changes.append(threads)


class Machine:
    """RAM that is there until it is not, and steps whose time depends on the threads."""

    def __init__(self, plan, *, threads: int = 2, movable: bool = True) -> None:
        settings = replace(plan.settings, threads=threads, prefill_chunk_tokens=512)
        ram = replace(plan.needs.ram, margin_bytes=256 * MIB)
        predicted = replace(plan.predicted, decode_tokens_per_s=100.0)
        self.plan = replace(plan, settings=settings, predicted=predicted, needs=replace(plan.needs, ram=ram))
        self.free_bytes = 8 * GIB
        self.executor = Executor(threads)
        executor = self.executor if movable else object()
        self.replanner = Replanner(self.plan, executor, ram=lambda: (self.free_bytes, "free memory"))

    def decode(self, tokens: int, seconds: dict[int, float], lanes: int = 1) -> None:
        for _ in range(tokens):
            self.replanner.decoded(lanes, seconds[self.executor.threads])

    @property
    def told(self) -> list[str]:
        return [str(replan) for replan in self.replanner.replanned]


@pytest.fixture
def machine(demo_engine):
    return Machine(demo_engine.plan)


def test_as_predicted_nothing_is_told(machine) -> None:
    machine.decode(10 * WINDOW_TOKENS, {2: 0.011})
    assert machine.told == []
    assert machine.replanner.lesson(MEASURED) == MEASURED


def test_a_slow_run_goes_on_with_the_faster_number_of_threads(machine, caplog) -> None:
    with caplog.at_level(logging.WARNING, "strata.replan"):
        machine.decode(WINDOW_TOKENS + TRIAL_TOKENS, {2: 0.02, 1: 0.0125})
    assert machine.executor.threads == 1
    assert machine.told == [
        "decoding at 50.0 tokens/s, 50% below the expected 100: trying 1 thread in place of 2",
        "80.0 tokens/s with 1 thread, 50.0 with 2: 1 thread from here on",
    ]
    assert [record.getMessage() for record in caplog.records] == machine.told
    machine.decode(2 * WINDOW_TOKENS, {1: 0.0125})
    assert len(machine.told) == 2


def test_where_other_threads_are_no_faster_the_plans_stay(machine) -> None:
    machine.decode(WINDOW_TOKENS + TRIAL_TOKENS + 4 * WINDOW_TOKENS, {2: 0.02, 1: 0.04})
    assert machine.executor.threads == 2
    assert len(machine.told) == 2
    assert machine.told[1].startswith(
        "no other number of threads is faster: nothing to change here; end other programs"
    )


def test_the_planned_threads_come_back_when_they_are_faster_again(machine) -> None:
    machine.decode(WINDOW_TOKENS + TRIAL_TOKENS, {2: 0.02, 1: 0.0125})
    machine.decode(RETRY_TOKENS + TRIAL_TOKENS, {2: 0.02, 1: 0.0125})
    assert (machine.executor.threads, len(machine.told)) == (1, 2)
    machine.decode(RETRY_TOKENS + TRIAL_TOKENS, {2: 0.01, 1: 0.0125})
    assert machine.executor.threads == 2
    assert machine.told[2] == "100 tokens/s with 2 threads, 80.0 with 1: 2 threads from here on"


def test_a_fast_run_is_told_and_left_alone(machine) -> None:
    machine.decode(3 * WINDOW_TOKENS, {2: 0.005})
    assert machine.told == [
        "decoding at 200 tokens/s, 100% above the expected 100: later predictions are corrected by it"
    ]
    assert machine.executor.changes == []


@pytest.mark.parametrize(("threads", "movable"), [(1, True), (4, False)])
def test_where_threads_cannot_change_the_user_is_told_what_can(demo_engine, threads, movable) -> None:
    machine = Machine(demo_engine.plan, threads=threads, movable=movable)
    machine.decode(2 * WINDOW_TOKENS, {threads: 0.02})
    assert len(machine.told) == 1
    assert "nothing to change here; end other programs" in machine.told[0]
    assert machine.replanner.replanned[0].change is None


def test_a_prompt_in_the_middle_of_a_trial_begins_it_anew_on_the_present_threads(machine) -> None:
    machine.decode(WINDOW_TOKENS + TURN_TOKENS, {2: 0.02, 1: 0.0125})
    assert machine.executor.threads == 1
    machine.replanner.prompt_step()
    assert machine.executor.threads == 2
    machine.decode(TRIAL_TOKENS, {2: 0.02, 1: 0.0125})
    assert machine.executor.threads == 1


def test_steps_of_several_sequences_are_held_against_their_own_beginning(machine) -> None:
    machine.decode(4 * WINDOW_TOKENS, {2: 0.03}, lanes=4)
    assert machine.told == []
    machine.decode(WINDOW_TOKENS, {2: 0.06}, lanes=4)
    assert machine.told[0].startswith("decoding at 66.7 tokens/s, 50% below the expected 133")


def test_another_number_of_sequences_begins_a_trial_anew(machine) -> None:
    machine.decode(WINDOW_TOKENS + 2, {2: 0.02, 1: 0.0125})
    machine.decode(1 + TRIAL_TOKENS, {2: 0.05, 1: 0.02}, lanes=3)
    assert machine.told[1] == "150 tokens/s with 1 thread, 60.0 with 2: 1 thread from here on"


def test_short_memory_makes_chunks_small_until_it_is_there_again(machine) -> None:
    machine.free_bytes = 255 * MIB
    for _ in range(3):
        machine.replanner.prompt_step()
    assert machine.replanner.chunk_tokens == 32
    assert machine.replanner.is_pressed
    assert machine.told == [
        "255 MiB of RAM left by free memory, less than the margin of 256 MiB: "
        "prompts in chunks of 32 tokens instead of 512"
    ]
    machine.free_bytes = 511 * MIB
    machine.replanner.prompt_step()
    assert machine.replanner.is_pressed
    machine.free_bytes = 512 * MIB
    machine.decode(WINDOW_TOKENS, {2: 0.01})
    assert machine.replanner.chunk_tokens == 512
    assert machine.told[1] == "512 MiB of RAM are free again: prompts in chunks of 512 tokens"


def test_what_was_not_run_as_planned_is_not_learned_from(machine) -> None:
    replanner = machine.replanner
    machine.decode(WINDOW_TOKENS + TRIAL_TOKENS, {2: 0.02, 1: 0.0125})
    lesson = replanner.lesson(MEASURED)
    assert lesson.decode_tokens_per_s == pytest.approx(50)  # of the 64 tokens that were
    assert lesson.ttft_s == MEASURED.ttft_s
    replanner.begin()
    machine.decode(WINDOW_TOKENS, {1: 0.0125})
    assert replanner.lesson(MEASURED) == replace(
        MEASURED, decode_tokens_per_s=None, prefill_tokens_per_s=None, ttft_s=None
    )


def test_threads_may_change_between_any_two_tokens_bit_for_bit(demo_engine) -> None:
    ids = demo_engine.prompt_ids("Once upon a time there was a little girl")
    reference = demo_engine.logits(ids)
    executor = demo_engine.executor
    before = demo_engine.plan.settings.threads
    try:
        for order in ((1, 2, 3), (3, 1, 2)):
            kv = executor.new_kv(64)
            rows = []
            for index, token in enumerate(ids):
                executor.set_threads(order[index % 3])
                rows.append(executor.forward([Step([token], kv)])[0])
            assert np.array_equal(np.concatenate(rows), reference)
    finally:
        executor.set_threads(before)
    with pytest.raises(ValueError, match="0 threads"):
        executor.set_threads(0)
    assert np.array_equal(demo_engine.logits(ids), reference)


def test_an_answer_is_the_same_where_the_run_is_replanned() -> None:
    with Engine(DEMO_MODEL, threads=2, context_tokens=256) as engine:
        text = [piece.token_id for piece in engine.generate("Once", max_tokens=150, sampling=GREEDY)]
        plan = replace(engine.plan, predicted=replace(engine.plan.predicted, decode_tokens_per_s=1e9))
    with Engine(DEMO_MODEL, plan) as engine:
        assert [piece.token_id for piece in engine.generate("Once", max_tokens=150, sampling=GREEDY)] == text
        assert "trying 1 thread" in str(engine.replanned[0])
        assert engine.replanned[0].token == WINDOW_TOKENS
        engine.learn()


def test_while_memory_is_short_a_batch_goes_one_by_one(demo_engine, monkeypatch) -> None:
    requests = [Request("Once", GREEDY, (), 8)] * 4
    reference = [answer.text for _, answer in sorted(demo_engine.stream_batch(requests))]
    together: list[int] = []
    forward = demo_engine.executor.forward

    def counted(steps, **options):
        together.append(len(steps))
        return forward(steps, **options)

    monkeypatch.setattr(demo_engine.executor, "forward", counted)
    with monkeypatch.context() as short:
        short.setattr(demo_engine._stepper.replanner, "_ram", lambda: (0, "free memory"))
        demo_engine._stepper.replanner.prompt_step()
        assert [answer.text for _, answer in sorted(demo_engine.stream_batch(requests))] == reference
    assert set(together) == {1}
    demo_engine._stepper.replanner.prompt_step()
    list(demo_engine.stream_batch(requests))
    assert max(together) == 4


def test_there_is_no_executor_for_a_loop_that_is_none(demo_engine) -> None:
    plan = demo_engine.plan
    magic = replace(plan, settings=replace(plan.settings, loop="magic"))
    with (
        GGUFFile.open(DEMO_MODEL) as gguf,
        pytest.raises(PlanError, match=r"'magic'; it must be one of program, sequential, llama\.cpp"),
    ):
        make_executor(gguf, magic, on_load=None)


def test_a_plan_given_by_hand_is_checked(demo_engine) -> None:
    plan = demo_engine.plan
    with pytest.raises(PlanError, match=r"settings\.loop is 'magic'; it must be one of"):
        Engine(DEMO_MODEL, replace(plan, settings=replace(plan.settings, loop="magic")))
    with pytest.raises(PlanError, match="the plan is for"):
        Engine(DEMO_MODEL, replace(plan, model=replace(plan.model, byte_size=1)))
    with pytest.raises(PlanError, match="is missing"):
        Engine(DEMO_MODEL, replace(plan, placements=plan.placements[1:]))
