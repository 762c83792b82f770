"""From options to a loaded draft: what is known for a model, what the plan chose, and what a run teaches the next."""

import logging
import shutil
from dataclasses import replace

import numpy as np
import pytest

from offload.errors import RequestError
from offload.gguf import GGUFFile
from planner.folders import cache_folder
from planner.planned_draft import DraftKind
from planner.profile import load_or_measure
from planner.solve import plan_here
from runtime.engine import Engine
from runtime.models import DEMO_DRAFT, DEMO_MODEL
from runtime.sampler import SamplingParams
from runtime.speculative.known import draft_wish
from runtime.speculative.options import DraftOptions
from tests.support import models
from tests.unit.runtime.test_feature_head import arrays

GREEDY = SamplingParams(temperature=0)


@pytest.fixture
def own_profile(tmp_path, monkeypatch):
    """What is learned here is forgotten afterwards."""
    load_or_measure()
    shutil.copytree(cache_folder(), tmp_path / "strata")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_known_drafts_are_smaller_files_of_the_folder_with_the_same_vocabulary(tmp_path, demo_engine):
    big = tmp_path / "big.gguf"
    shutil.copy(DEMO_MODEL, big)
    shutil.copy(DEMO_DRAFT, tmp_path / "small.gguf")
    models.write_model(tmp_path / "stranger.gguf", models.spec_of("llama"), "Q8_0")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with GGUFFile.open(big) as gguf:
        found = draft_wish(DraftOptions("auto"), gguf, demo_engine.tokenizer)
    assert found is not None
    assert [source.name for source in found.sources] == ["small.gguf"]
    assert (found.looks_up, found.is_named, found.is_forced) == (True, False, False)
    with GGUFFile.open(DEMO_MODEL) as gguf:
        built_in = draft_wish(DraftOptions("auto", synthetic=0.5), gguf, demo_engine.tokenizer)
        assert draft_wish(DraftOptions(), gguf, demo_engine.tokenizer) is None
        with pytest.raises(RequestError, match="2 files"):
            draft_wish(DraftOptions("one.gguf,two.gguf"), gguf, demo_engine.tokenizer)
    assert built_in is not None
    assert [source.path for source in built_in.sources] == [str(DEMO_DRAFT)]
    assert (built_in.is_forced, built_in.acceptance) == (True, 0.5)


@pytest.mark.usefixtures("own_profile")
def test_what_a_run_tells_of_a_draft_is_expected_by_the_next_plan():
    options = DraftOptions(str(DEMO_DRAFT), most=4, forced=True)
    with Engine(DEMO_MODEL, threads=1, draft=options) as engine:
        first = engine.plan.draft
        assert len(list(engine.generate("Once upon a time", max_tokens=48, sampling=GREEDY))) > 8
        engine.learn()
        seen = engine.speculation.totals.acceptance_rate
    with Engine(DEMO_MODEL, threads=1, draft=options) as engine:
        second = engine.plan.draft
    assert first.acceptance_source == "assumed"
    assert second.acceptance_source == "learned from 1 run"
    assert second.acceptance == pytest.approx(seen, abs=0.25)


def test_a_head_is_planned_and_loaded(tmp_path, demo_engine):
    path = tmp_path / "head.npz"
    np.savez(path, **arrays(np.random.default_rng(1)))
    with Engine(DEMO_MODEL, threads=1, draft=DraftOptions(str(path), most=3, forced=True)) as engine:
        assert engine.plan.draft.kind is DraftKind.HEAD
        said = [piece.token_id for piece in engine.generate("She said", max_tokens=12, sampling=GREEDY)]
        assert engine.speculation.totals.verified > 0
    plain = demo_engine.generate("She said", max_tokens=12, sampling=GREEDY)
    assert said == [piece.token_id for piece in plain]


def test_a_plan_without_a_thought_of_drafts_gets_one_in_what_it_leaves(caplog):
    with GGUFFile.open(DEMO_MODEL) as gguf:
        plan = plan_here(gguf, threads=1, gpu="off")
    options = DraftOptions(str(DEMO_DRAFT), forced=True)
    with Engine(DEMO_MODEL, plan, draft=options) as engine:
        assert engine.speculation.source.name == DEMO_DRAFT.name
    full = replace(plan, budget=replace(plan.budget, ram_bytes=plan.needs.ram.needed_bytes))
    with caplog.at_level(logging.WARNING), Engine(DEMO_MODEL, full, draft=options) as engine:
        assert engine.speculation is None
    assert "do not fit together" in caplog.text
