"""The engine on the built-in model: streams, batches, sessions, logits, cancellation."""

import threading
from dataclasses import replace

import numpy as np
import pytest

from offload.errors import ModelFormatError, RequestError
from runtime.engine import Engine
from runtime.generation import Request
from runtime.models import DEMO_MODEL
from runtime.sampler import SamplingParams

GREEDY = SamplingParams(temperature=0)
PROMPTS = ["Once upon a time", "The old man looked at the sea", "A dog", "She said", "In the morning the sun"]


def text_of(engine, prompt, **options):
    return "".join(piece.text for piece in engine.generate(prompt, **options))


def test_greedy_text_is_readable_and_repeatable(demo_engine):
    first = text_of(demo_engine, "Once upon a time", max_tokens=40, sampling=GREEDY)
    assert first == text_of(demo_engine, "Once upon a time", max_tokens=40, sampling=GREEDY)
    assert "there was a" in first


def test_greedy_text_follows_the_logits(demo_engine):
    ids = demo_engine.prompt_ids("Once upon a time")
    pieces = list(demo_engine.generate(ids, max_tokens=8, sampling=GREEDY))
    for piece in pieces:
        assert piece.token_id == int(demo_engine.logits(ids)[-1].argmax())
        ids.append(piece.token_id)


def test_a_seed_decides_the_text(demo_engine):
    sampling = SamplingParams(temperature=1.0, seed=7)
    first = text_of(demo_engine, "Once", max_tokens=20, sampling=sampling)
    assert first == text_of(demo_engine, "Once", max_tokens=20, sampling=sampling)
    others = {text_of(demo_engine, "Once", max_tokens=20, sampling=SamplingParams(seed=seed)) for seed in range(4)}
    assert len(others) > 1


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(seed=3)])
def test_an_answer_does_not_depend_on_its_neighbours(demo_engine, sampling):
    alone = [text_of(demo_engine, prompt, max_tokens=12, sampling=sampling) for prompt in PROMPTS]
    together = demo_engine.generate_batch(PROMPTS, max_tokens=12, sampling=sampling)
    assert [completion.text for completion in together] == alone
    assert [
        completion.text for completion in demo_engine.generate_batch(PROMPTS[::-1], max_tokens=12, sampling=sampling)
    ] == alone[::-1]


def test_a_batch_larger_than_the_context_waits_its_turn(demo_engine):
    room = demo_engine.context_tokens
    requests = [Request(prompt, GREEDY, (), room // 2 - 20 * index) for index, prompt in enumerate(PROMPTS)]
    reference = [text_of(demo_engine, one.prompt, max_tokens=30, sampling=GREEDY) for one in requests]
    answers = {}
    for index, answer in demo_engine.stream_batch(requests, parallel=4):
        answers[index] = answer.text
    assert set(answers) == set(range(len(requests)))
    for index, text in enumerate(reference):
        assert answers[index].startswith(text[:40]) or text.startswith(answers[index])


def test_a_batch_is_cancelled_at_a_token_boundary(demo_engine):
    cancelled = threading.Event()
    requests = [Request("Once", GREEDY, (), 2), Request("Once", GREEDY, (), 400)]
    for index, _ in demo_engine.stream_batch(requests, cancelled=cancelled):
        assert index == 0
        cancelled.set()


def test_a_session_computes_only_what_is_new(demo_engine):
    session = demo_engine.session()
    ids = demo_engine.prompt_ids("Once upon a time there was a little girl named Lily.")
    said = [piece.token_id for piece in demo_engine.generate(ids, max_tokens=5, sampling=GREEDY, session=session)]
    following = [*ids, *said, *demo_engine.prompt_ids(" She")]
    warm = text_of(demo_engine, following, max_tokens=10, sampling=GREEDY, session=session)
    assert demo_engine.measured.prompt_tokens < len(following) - len(ids)
    assert warm == text_of(demo_engine, following, max_tokens=10, sampling=GREEDY)


def test_cancelling_keeps_what_was_said(demo_engine):
    cancelled = threading.Event()
    pieces = []
    for piece in demo_engine.generate("Once upon a time", sampling=GREEDY, cancelled=cancelled):
        pieces.append(piece)
        if len(pieces) == 5:
            cancelled.set()
    assert len(pieces) == 6
    assert pieces[-1].finish_reason == "cancelled"


def test_cancelling_before_the_first_token_yields_nothing(demo_engine):
    cancelled = threading.Event()
    cancelled.set()
    assert list(demo_engine.generate("Once", cancelled=cancelled)) == []


def test_progress_of_a_long_prompt_is_told():
    told = []
    with Engine(DEMO_MODEL, context_tokens=64, threads=1) as engine:
        plan = engine.plan
    with Engine(DEMO_MODEL, replace(plan, settings=replace(plan.settings, prefill_chunk_tokens=8))) as engine:
        ids = list(range(100, 130))
        list(engine.generate(ids, max_tokens=1, on_prefill=lambda done, total: told.append((done, total))))
    assert told == [(0, 30), (8, 30), (16, 30), (24, 30)]


def test_logits_are_float32_of_every_token(demo_engine):
    logits = demo_engine.logits(demo_engine.prompt_ids("Once upon a time"))
    assert logits.dtype == np.float32
    assert logits.shape == (4, demo_engine.tokenizer.vocab_size)
    with pytest.raises(RequestError, match="do not fit the context"):
        demo_engine.logits([1] * (demo_engine.context_tokens + 1))


def test_row_26_a_prompt_longer_than_the_context_is_refused_with_both_numbers(demo_engine):
    room = demo_engine.context_tokens
    with pytest.raises(RequestError, match=rf"{room + 5} tokens.*{room}"):
        next(demo_engine.generate([5] * (room + 5)))
    with pytest.raises(RequestError, match=rf"{room + 5} tokens.*{room}"):
        demo_engine.generate_batch([[5] * (room + 5)])


def test_a_run_is_measured_and_learned_from(demo_engine):
    list(demo_engine.generate("Once upon a time", max_tokens=10, sampling=GREEDY))
    measured = demo_engine.learn()
    assert measured.decode_tokens_per_s > 0
    assert measured.ttft_s > 0
    assert measured.peak_ram_bytes > 50 << 20


def test_loading_tells_its_progress():
    told = []
    with Engine(DEMO_MODEL, threads=1, on_load=lambda done, total: told.append((done, total))):
        pass
    assert told[-1][0] == told[-1][1] > 14 << 20
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_a_file_that_is_no_model_is_refused(tmp_path):
    path = tmp_path / "no.gguf"
    path.write_bytes(b"not a model at all")
    with pytest.raises(ModelFormatError, match=r"no\.gguf"):
        Engine(path)
