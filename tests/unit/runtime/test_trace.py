"""Traces of runs: events that viewers read, lanes for each kind of work, and refusals."""

import json

import pytest

from offload.errors import RequestError
from runtime.engine import Engine
from runtime.generation import Request
from runtime.models import DEMO_MODEL
from runtime.sampler import SamplingParams
from runtime.speculative.options import DraftOptions
from runtime.trace import Trace
from tests.support.command import strata

GREEDY = SamplingParams(temperature=0)
FAST = ("-m", "demo", "-t", "1", "--temp", "0", "--raw", "-q", "-p", "Once upon a time")


@pytest.fixture
def run(capsys, monkeypatch):
    return lambda *arguments, stdin="": strata(capsys, monkeypatch, *arguments, stdin=stdin)


def read(path):
    """Events by lane, and the names of counters."""
    events = json.loads(path.read_text())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    lanes = {name: [] for name in names.values()}
    for event in events:
        if event["ph"] == "X":
            assert event["dur"] >= 0
            lanes[names[event["tid"]]].append(event)
    return lanes, {event["name"] for event in events if event["ph"] == "C"}


def test_spans_are_lanes_in_microseconds_from_the_first_on(tmp_path):
    trace = Trace(tmp_path / "trace.json")
    trace.add("compute", "decode", 10.0, 10.5, tokens=1)
    trace.add("draft", "draft", 10.5, 10.75)
    trace.count("MB", 10.25, 3.0)
    trace.write()
    lanes, counters = read(tmp_path / "trace.json")
    assert [(event["ts"], event["dur"], event["args"]) for event in lanes["compute"]] == [(0.0, 5e5, {"tokens": 1})]
    assert lanes["draft"][0]["ts"] == 5e5
    assert counters == {"MB"}


def test_an_empty_trace_is_still_one(tmp_path):
    Trace(tmp_path / "trace.json").write()
    assert read(tmp_path / "trace.json") == ({}, set())


def test_a_file_that_cannot_be_is_refused_before_anything_is_done(tmp_path):
    with pytest.raises(RequestError, match="cannot be written"):
        Trace(tmp_path / "none" / "trace.json")


def test_a_run_shows_its_steps(run, tmp_path):
    path = tmp_path / "trace.json"
    run("run", *FAST, "-n", "8", "--trace", str(path))
    lanes, _ = read(path)
    assert {event["name"] for event in lanes["compute"]} == {"prefill", "decode"}
    assert len(lanes["sample"]) == len(lanes["compute"])
    assert run("run", *FAST, "--trace", str(tmp_path / "none" / "t.json")).code == 2


def test_drafts_show_what_they_take(tmp_path):
    path = tmp_path / "trace.json"
    with Engine(DEMO_MODEL, threads=1, draft=DraftOptions("ngram", forced=True)) as engine:
        trace = Trace(path)
        engine.trace(trace)
        requests = [Request("The cat sat. The cat sat. The cat", GREEDY, (), 12)] * 2
        list(engine.generate("The cat sat. The cat sat. The cat", max_tokens=12, sampling=GREEDY))
        list(engine.stream_batch(requests, parallel=2))
        trace.write()
    lanes, _ = read(path)
    assert {"compute", "sample", "draft", "verify", "exchange"} <= set(lanes)
    assert max(event["args"].get("drafts", 0) for event in lanes["verify"]) >= 1
    assert max(event["args"].get("sequences", 1) for event in lanes["verify"]) == 2


def test_a_benchmark_shows_its_runs(run, tmp_path):
    path = tmp_path / "trace.json"
    run("bench", "-p", "8", "-n", "4", "-r", "1", "--trace", str(path))
    lanes, _ = read(path)
    assert [event["name"] for events in lanes.values() for event in events] == ["pp8", "pp8", "tg4", "tg4"]
