"""Drafts on real models: the answers of plain decoding from every source, at every depth, streamed or not."""

import threading
from dataclasses import astuple

import numpy as np
import pytest

from cpu_kernels.reference.kv_codes import unpacked_keys, unpacked_values
from offload.errors import RequestError
from runtime.engine import Engine
from runtime.generation import Generation, Request
from runtime.models import DEMO_DRAFT, DEMO_MODEL
from runtime.sampler import SamplingParams
from runtime.session import Session
from runtime.speculative.account import Account
from runtime.speculative.choosers import Chooser
from runtime.speculative.options import DEFAULT_MOST, DraftOptions
from runtime.speculative.sequence import Passed, SpeculativeSequence
from runtime.speculative.totals import Totals
from tests.support import models, programs
from tests.support.drafting import AnyLetterTokenizer, PatternDraft, TreePatternDraft, policy

GREEDY = SamplingParams(temperature=0)
SAMPLINGS = (
    GREEDY,
    SamplingParams(seed=5),
    SamplingParams(seed=6, temperature=1.3, repetition_penalty=1.3, presence_penalty=0.2, penalty_last_n=16),
)
PROMPTS = ("Once upon a time", "The cat sat on the mat. The dog sat on the rug. The cat sat", "She said")


def answers(engine, **options):
    return [
        [piece.token_id for piece in engine.generate(prompt, max_tokens=24, sampling=sampling, **options)]
        for prompt in PROMPTS
        for sampling in SAMPLINGS
    ]


@pytest.fixture(scope="module")
def plain_answers(demo_engine):
    return answers(demo_engine)


@pytest.mark.parametrize(
    "options",
    [
        DraftOptions("ngram", forced=True),
        DraftOptions(str(DEMO_DRAFT), most=4, forced=True),
        DraftOptions(str(DEMO_DRAFT), most=4, forced=True, tree=0),
        DraftOptions(str(DEMO_DRAFT), most=1, forced=True),
        DraftOptions("auto", most=16, forced=True),
        DraftOptions(f"{DEMO_DRAFT},ngram", forced=True),
        DraftOptions("auto"),
        DraftOptions(synthetic=0.7, forced=True),
        DraftOptions(str(DEMO_DRAFT), synthetic=0.5, forced=True),
        DraftOptions(str(DEMO_DRAFT), synthetic=0.5, forced=True, tree=0),
    ],
    ids=lambda options: "-".join(map(str, (options.source.rpartition("/")[2], *astuple(options)[1:]))),
)
def test_answers_are_those_of_plain_decoding(options, plain_answers):
    with Engine(DEMO_MODEL, threads=1, draft=options) as engine:
        assert answers(engine) == plain_answers
        totals = engine.speculation.totals
        assert totals.tokens == 23 or not options.forced
        assert totals.failure is None
        if options.forced and options.synthetic:
            assert totals.acceptance_rate > 0.2
            assert totals.tokens_per_pass > 1.2


@pytest.mark.parametrize("threads", [1, 2])
def test_answers_of_a_batch_are_those_of_plain_decoding(threads, demo_engine):
    requests = [Request(prompt, sampling, (), 20) for prompt in PROMPTS for sampling in SAMPLINGS]
    reference = [answer.token_ids for answer in demo_engine.generate_batch(requests)]
    with Engine(DEMO_MODEL, threads=threads, draft=DraftOptions("auto", forced=True)) as engine:
        for parallel in (1, 3):
            found = dict(engine.stream_batch(requests, parallel=parallel))
            assert [found[index].token_ids for index in range(len(requests))] == reference
            assert engine.speculation.totals.tokens_of[parallel] > 40
            assert engine.speculation.totals.passes > 20


def test_a_conversation_goes_on_with_drafts(demo_engine):
    with Engine(DEMO_MODEL, threads=1, draft=DraftOptions(str(DEMO_DRAFT), forced=True)) as engine:
        mine, other = engine.session(), demo_engine.session()
        ids = engine.prompt_ids("Once upon a time")
        for turn in range(3):
            sampling = SamplingParams(seed=turn)
            said = [p.token_id for p in engine.generate(ids, max_tokens=9, sampling=sampling, session=mine)]
            assert said == [
                p.token_id for p in demo_engine.generate(ids, max_tokens=9, sampling=sampling, session=other)
            ]
            left = len(mine.token_ids) - 1 - mine.kv.length  # where another way than a tree's last was right
            assert 0 <= left <= DEFAULT_MOST
            assert other.kv.length == len(mine.token_ids) - 1
            ids = [*ids, *said, *engine.prompt_ids(" She")]


def test_cancelling_and_leaving_an_answer_keep_the_cache_sound(demo_engine):
    options = DraftOptions(synthetic=1.0, forced=True)
    with Engine(DEMO_MODEL, threads=1, draft=options) as engine:
        session, cancelled = engine.session(), threading.Event()
        pieces = []
        for piece in engine.generate(
            "Once upon a time", max_tokens=60, sampling=GREEDY, session=session, cancelled=cancelled
        ):
            pieces.append(piece.token_id)
            if len(pieces) == 6:
                cancelled.set()
        assert len(pieces) == 7
        assert session.kv.length == len(session.token_ids) - 1
        stream = engine.generate("Once upon a time", max_tokens=60, sampling=GREEDY, session=session)
        assert [next(stream).token_id for _ in range(5)] == pieces[:5]
        stream.close()
        assert session.kv.length == len(session.token_ids) - 1


def test_a_model_from_flash_gives_the_same_with_drafts(tmp_path):
    path = models.write_model(tmp_path / "moe.gguf", models.spec_of("mixtral"), "Q8_0")
    prompt = models.prompt(length=12)
    with programs.executor(path) as whole, programs.streaming(path, 4) as (streamed, _):
        reference = decoded(whole, prompt, None)
        for accepted in ([True], [False], [True, True, False]):
            found = decoded(streamed, prompt, PatternDraft(reference.session.token_ids, accepted, [5]))
            assert found.session.token_ids == reference.session.token_ids
    with programs.streaming(path, 16) as (streamed, _):  # a pass takes eight tokens
        found = decoded(streamed, prompt, TreePatternDraft(reference.session.token_ids, [0, 1, 2, 0], 30))
        assert found.session.token_ids == reference.session.token_ids


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3moe"])
def test_caches_are_those_of_plain_decoding_bit_for_bit(name, tmp_path):
    path = models.write_model(tmp_path / "m.gguf", models.spec_of(name), "Q8_0")
    prompt = models.prompt(length=50)
    rng = np.random.default_rng(3)
    with programs.executor(path) as runner:
        reference = decoded(runner, prompt, None)
        for depth in (1, 2, 5, 9, 16):
            pattern = rng.integers(0, 3, 17) > 0
            draft = PatternDraft(reference.session.token_ids, pattern.tolist(), [depth, depth, 1])
            found = decoded(runner, prompt, draft)
            assert found.session.token_ids == reference.session.token_ids
            assert_rows_are_those_of(reference, found)
        for ranks, most in (([0, 1, 2, 3], 12), ([1], 40), ([0, 0, 0, 2], 25)):
            found = decoded(runner, prompt, TreePatternDraft(reference.session.token_ids, ranks, most))
            assert found.session.token_ids == reference.session.token_ids
            assert found.session.kv.length >= 50 + 40 - 1 - 16
            assert_rows_are_those_of(reference, found)


def assert_rows_are_those_of(reference, found):
    """Rows of all tokens whose rows are there, bit for bit."""
    for mine, plain in zip(rows_of(found.session.kv), rows_of(reference.session.kv), strict=True):
        np.testing.assert_array_equal(mine.view(np.uint16), plain.view(np.uint16)[:, : mine.shape[1]])


def decoded(runner, prompt, draft):
    """40 tokens, with or without drafts."""
    session = Session(runner.new_kv(100))
    state = Generation(AnyLetterTokenizer(), session, prompt, sampling=SamplingParams(seed=1), max_tokens=40)
    state.advance(runner.forward([state.next_step(100)])[0][-1])
    sequence, by = None, policy(most=16, most_tree=40)
    if draft is not None:
        sequence = SpeculativeSequence(runner, draft, Chooser(state.sampler), Account())
    totals = Totals("pattern")
    while not state.finished:
        if sequence is None:
            state.advance(runner.forward([state.next_step(1)])[0][-1])
        else:
            passed = sequence.next(state, by, totals)
            assert isinstance(passed, Passed)
            state.advance(passed.row)
    if sequence is not None:
        sequence.end(state, by, totals)
    return state


def rows_of(kv):
    """Keys and values of all layers, as far as they are filled."""
    for layer, layout in enumerate(kv.layout.layers):
        yield unpacked_keys(layout, kv.layer_chunks(layer), kv.length)
        yield unpacked_values(layout, kv.layer_chunks(layer), kv.length)


def test_drafts_need_a_loop_that_computes_several_tokens_as_each():
    with pytest.raises(RequestError, match="sequential loop"):
        Engine(DEMO_MODEL, threads=1, loop="sequential", draft=DraftOptions("ngram"))


def test_another_vocabulary_is_refused_with_the_differences(tmp_path):
    path = models.write_model(tmp_path / "other.gguf", models.spec_of("llama"))
    with pytest.raises(RequestError, match=r"of 384 tokens differ: .* is .* and .* in the draft"):
        Engine(DEMO_MODEL, threads=1, draft=DraftOptions(str(path)))


@pytest.mark.parametrize("source", ["nothing.gguf", f"{DEMO_DRAFT},{DEMO_MODEL}"])
def test_a_source_that_cannot_be_is_refused(source):
    with pytest.raises(RequestError, match="draft"):
        Engine(DEMO_MODEL, threads=1, draft=DraftOptions(source))


@pytest.mark.parametrize("values", [{"most": 0}, {"most": 17}, {"synthetic": 1.5}, {"synthetic": float("nan")}])
def test_options_out_of_bounds_are_refused(values):
    with pytest.raises(RequestError):
        DraftOptions("ngram", **values)


def test_a_run_with_drafts_does_not_correct_plain_predictions():
    with Engine(DEMO_MODEL, threads=1, draft=DraftOptions(synthetic=1.0, forced=True)) as engine:
        list(engine.generate("Once upon a time", max_tokens=40, sampling=GREEDY))
        lesson = engine._stepper.replanner.lesson(engine.measured)
        assert engine.measured.decode_tokens_per_s > 0
        assert lesson.decode_tokens_per_s is None
