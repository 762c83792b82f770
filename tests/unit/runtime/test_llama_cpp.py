"""llama.cpp as an executor: sequences, truncation, what goes wrong; on a stand-in for the library."""

import importlib.metadata
import json
import statistics
import sys
from dataclasses import replace

import numpy as np
import pytest

from offload.errors import DeviceError, RequestError, UnsupportedModelError
from offload.gguf import GGUFFile
from offload.tiers import Device, Tier
from planner.llama_cpp_flags import llama_cpp_flags
from planner.model_shape import UnitKind
from runtime.engine import Engine
from runtime.executor import llama_cpp as module
from runtime.executor.base import Step
from runtime.models import DEMO_MODEL
from runtime.sampler import SamplingParams
from tests.support.command import strata
from tests.support.fake_llama_cpp import RAM_BUFFERS, FakeLlamaCpp


@pytest.fixture
def library(monkeypatch):
    fake = FakeLlamaCpp()
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)
    monkeypatch.setattr(module, "version", lambda _name: "0")
    return fake


@pytest.fixture
def engine(library):
    with Engine(DEMO_MODEL, loop="llama.cpp", context_tokens=64, threads=1) as made:
        yield made


def predicted(token, position):
    return (token + position) % 7 + 100


def test_an_answer_follows_the_librarys_logits(engine, library):
    pieces = list(engine.generate([5, 6, 7], max_tokens=4, sampling=SamplingParams(temperature=0)))
    tokens, last = [], 7
    for position in range(2, 6):
        last = predicted(last, position)
        tokens.append(last)
    assert [piece.token_id for piece in pieces] == tokens
    assert library.context_params.n_ctx == 64
    assert library.context_params.n_threads == 1
    assert library.model_params.n_gpu_layers == 0
    assert library.open_batches == 0


def loaded(library, plan):
    """What the executor told llama.cpp about a plan, under the names of the flags."""
    with GGUFFile.open(DEMO_MODEL) as gguf:
        module.LlamaCppExecutor(gguf, plan).close()
    model, context = library.model_params, library.context_params
    return {
        "gpu_layers": model.n_gpu_layers,
        "mmap": model.load_mode == library.LLAMA_LOAD_MODE_MMAP,
        "threads": context.n_threads,
        "context_tokens": context.n_ctx,
        "batch_tokens": context.n_ubatch,
        "key_type": {library.GGML_TYPE_F16: "f16", library.GGML_TYPE_F32: "f32"}[context.type_k],
        "held_back": tuple(library.held_back),
    }


@pytest.mark.parametrize(
    "tier_of",
    [
        lambda _: Tier.RAM,
        lambda _: Tier.GPU,
        lambda one: Tier.RAM if one.kind is UnitKind.EXPERTS else Tier.GPU,
        lambda one: Tier.RAM if one.kind is UnitKind.EXPERTS and one.layer != 1 else Tier.GPU,
        lambda one: Tier.GPU if (one.layer or 0) >= 2 else Tier.RAM,
        lambda one: Tier.FLASH if one.kind is UnitKind.EXPERTS else Tier.RAM,
    ],
)
def test_it_loads_by_the_flags_that_are_printed(engine, library, tier_of):
    placements = tuple(replace(one, tier=tier_of(one), device=Device.GPU) for one in engine.plan.placements)
    plan = replace(engine.plan, placements=placements)
    flags = llama_cpp_flags(plan)
    told = loaded(library, plan)
    assert told.pop("held_back") == tuple((pattern, RAM_BUFFERS) for pattern in flags.held_back())
    assert told == {name: getattr(flags, name) for name in told}


def test_libraries_without_load_modes_are_told_by_use_mmap(engine, library, monkeypatch):
    monkeypatch.delattr(FakeLlamaCpp, "LLAMA_LOAD_MODE_NONE")
    with GGUFFile.open(DEMO_MODEL) as gguf:
        module.LlamaCppExecutor(gguf, engine.plan).close()
    assert library.model_params.use_mmap is False


def test_logits_of_all_tokens(engine):
    assert engine.logits([5, 6, 7]).argmax(axis=1).tolist() == [predicted(5, 0), predicted(6, 1), predicted(7, 2)]


def test_sequences_are_apart_and_their_ids_come_back(engine, library):
    executor = engine.executor
    first, second = executor.new_kv(8), executor.new_kv(8)
    assert first.sequence_id != second.sequence_id
    executor.forward([Step([1, 2], first), Step([3], second)], logits="none")
    assert (first.length, second.length) == (2, 1)
    first.truncate(1)
    assert executor.forward([Step([9], first)])[0].argmax() == predicted(9, 1)
    number = first.sequence_id
    del first
    assert library.sequences[number] == 0
    held = [executor.new_kv(8) for _ in range(module.MAX_SEQUENCES - 1)]
    with pytest.raises(RequestError, match="64 sequences"):
        executor.new_kv(8)
    del held


def test_a_failed_step_is_told_and_changes_nothing(engine, library):
    kv = engine.executor.new_kv(8)
    library.fail = "decode"
    with pytest.raises(DeviceError, match="status 2"):
        engine.executor.forward([Step([1], kv)])
    assert kv.length == 0
    assert library.open_batches == 0


@pytest.mark.parametrize(("fail", "error"), [("load", UnsupportedModelError), ("context", DeviceError)])
def test_a_library_that_refuses_gives_a_typed_error(library, fail, error):
    library.fail = fail
    with pytest.raises(error):
        Engine(DEMO_MODEL, loop="llama.cpp")


def test_close_frees_once(library):
    engine = Engine(DEMO_MODEL, loop="llama.cpp")
    kv = engine.executor.new_kv(4)
    engine.close()
    engine.executor.close()
    del kv
    assert library.freed == ["context", "model"]


def test_without_the_extra_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(UnsupportedModelError, match="llama-cpp-python") as raised:
        Engine(DEMO_MODEL, loop="llama.cpp")
    assert "pip install" in raised.value.hint


@pytest.mark.peer
def test_the_library_itself_gives_the_same_text():
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    importlib.metadata.version("llama-cpp-python")
    greedy = SamplingParams(temperature=0)
    with Engine(DEMO_MODEL, threads=1) as ours, Engine(DEMO_MODEL, loop="llama.cpp", threads=1) as theirs:
        ids = ours.prompt_ids("Once upon a time")
        assert np.argmax(ours.logits(ids), axis=1).tolist() == np.argmax(theirs.logits(ids), axis=1).tolist()
        first = [piece.token_id for piece in ours.generate(ids, max_tokens=20, sampling=greedy)]
        assert [piece.token_id for piece in theirs.generate(ids, max_tokens=20, sampling=greedy)] == first


def test_bench_measures_a_peer_in_turn(library, capsys, monkeypatch):
    arguments = ("bench", "-m", "demo", "-t", "1", "-p", "8", "-n", "4", "-r", "3", "--peer", "llama.cpp")
    outcome = strata(capsys, monkeypatch, *arguments, "-o", "json")
    for row in json.loads(outcome.stdout):
        pairs = zip(row["samples_ts"], row["peer_samples_ts"], strict=True)
        assert row["ratio"] == pytest.approx(statistics.median(ours / theirs for ours, theirs in pairs))
        assert row["peer_avg_ts"] == pytest.approx(statistics.fmean(row["peer_samples_ts"]))
    table = strata(capsys, monkeypatch, *arguments).stdout.splitlines()
    assert table[0].endswith("| peer t/s | ratio |")
    assert len(table) == 4
