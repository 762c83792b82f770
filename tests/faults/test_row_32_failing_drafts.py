"""A draft that fails in the middle of an answer: the answer goes on without, as it would have been, and it is told."""

import logging

import pytest

from offload.errors import DeviceError
from runtime.engine import Engine
from runtime.models import DEMO_DRAFT, DEMO_MODEL
from runtime.sampler import SamplingParams
from runtime.speculative.options import DraftOptions

SAMPLING = SamplingParams(seed=2)


class FailingExecutor:
    """The draft's executor until its Nth call, then a device that is gone."""

    def __init__(self, executor, calls):
        self._executor = executor
        self._calls = calls

    def new_kv(self, capacity_tokens):
        return self._executor.new_kv(capacity_tokens)

    def forward(self, steps, *, logits="last"):
        if not self._calls:
            raise DeviceError("the draft's device is gone")
        self._calls -= 1
        return self._executor.forward(steps, logits=logits)

    def close(self):
        self._executor.close()


def said(engine):
    return [piece.token_id for piece in engine.generate("Once upon a time", max_tokens=20, sampling=SAMPLING)]


@pytest.mark.parametrize("calls", range(6))
def test_the_answer_goes_on_whichever_call_of_the_draft_fails(calls, demo_engine, caplog):
    caplog.set_level(logging.WARNING, "strata")
    reference = said(demo_engine)
    with Engine(DEMO_MODEL, threads=1, draft=DraftOptions(str(DEMO_DRAFT), most=3, forced=True)) as engine:
        source = engine.speculation.source
        source._executor = FailingExecutor(source._executor, calls)
        for _ in range(2):
            assert said(engine) == reference
            assert "device is gone" in engine.speculation.totals.failure
    assert caplog.text.count("answers go on without") == 1


def test_a_draft_that_cannot_begin_is_left_out(demo_engine, monkeypatch):
    with Engine(DEMO_MODEL, threads=1, draft=DraftOptions(str(DEMO_DRAFT), forced=True)) as engine:

        def refuse(*_):
            raise MemoryError("no room for a cache")

        monkeypatch.setattr(engine.speculation.source, "sequence", refuse)
        assert said(engine) == said(demo_engine)
        assert "no room for a cache" in engine.speculation.totals.summary()
