"""`strata cache simulate`: what it prints, draws and refuses."""

import json
from dataclasses import replace

import pytest

from offload.synthetic_trace import synthetic_trace
from tests.support.command import strata


@pytest.fixture
def run(capsys, monkeypatch):
    return lambda *arguments: strata(capsys, monkeypatch, "cache", "simulate", *arguments)


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """Of a model shaped and called as the built-in one: 4 layers of 16 experts, 2 used."""
    path = tmp_path_factory.mktemp("trace") / "trace.npz"
    made = synthetic_trace(4, 16, 2, 200, zipf_exponent=0.8, reuse=0.2, seed=1)
    replace(made, model="strata demo moe").save(path)
    return str(path)


def test_a_table_of_policies_and_sizes(run, trace):
    outcome = run(trace, "--slots", "32,16")
    assert outcome.code == 0
    lines = [line.split() for line in outcome.stdout.splitlines()]
    assert outcome.stdout.startswith("strata demo moe: 200 tokens, 4 layers of 16 experts, 2 used")
    assert lines[2][-4:] == ["least-stale", "belady", "token", "best"]
    assert [line[0] for line in lines[3:5]] == ["16", "32"]
    assert lines[4][1] == "50%"
    assert lines[-1][:4] == ["best", "over", "these", "sizes:"]


def test_json(run, trace):
    document = json.loads(run(trace, "--slots", "16,64,1000", "--warm-up", "50", "--json").stdout)
    assert (document["model"], document["tokens"], document["warm_up_tokens"]) == ("strata demo moe", 200, 50)
    assert [size["slots"] for size in document["sizes"]] == [16, 64]
    for size in document["sizes"]:
        rates = {name: figures["hit_rate"] for name, figures in size["policies"].items()}
        assert rates.keys() == {"lru", "lfu", "score", "least-stale"}
        assert rates[size["best"]] == max(rates.values()) <= size["bound"]["hit_rate"]
        assert size["bound"]["lookups"] == 150 * 4 * 2
    assert document["best"] in rates


def test_sizes_in_bytes_of_a_model(run, trace):
    document = json.loads(run(trace, "--ram", "2MiB,4MiB", "-m", "demo", "--json").stdout)
    slot_bytes = document["slot_bytes"]
    assert slot_bytes == 3 * 256 * 256 // 32 * 34  # gate, up and down in Q8_0
    assert [size["slots"] for size in document["sizes"]] == [(2 << 20) // slot_bytes, (4 << 20) // slot_bytes]
    shown = run(trace, "--ram", "2MiB", "-m", "demo").stdout
    assert "2.0 MiB" in shown
    assert "…" not in shown


def test_sizes_nobody_asked_for_and_one_policy(run, trace):
    document = json.loads(run(trace, "--policy", "lru", "--tokens-per-step", "8", "--json").stdout)
    assert [size["slots"] for size in document["sizes"]] == [4, 8, 16, 24, 32, 40, 48, 56]
    assert document["best"] == "lru"
    assert "best over" not in run(trace, "--policy", "lru").stdout


def test_a_picture(run, trace, tmp_path):
    pytest.importorskip("matplotlib")
    assert "drawn to" in run(trace, "--slots", "16,32", "--plot", str(tmp_path / "hits.png")).stderr
    assert (tmp_path / "hits.png").read_bytes().startswith(b"\x89PNG")


def test_requests_that_make_no_sense(run, trace):
    for arguments, message in (
        (("--slots", "16", "--ram", "1GiB"), "both say how large"),
        (("--ram", "1GiB"), "how large an expert is"),
        (("--slots", "many"), "--slots 64,128,256"),
        (("--slots", "-1"), "fewer than 0"),
        (("--ram", "much", "-m", "demo"), "is not a size"),
        (("--warm-up", "200"), "200 tokens"),
        (("--policy", "magic"), "magic"),
    ):
        outcome = run(trace, *arguments)
        assert outcome.code == 2, arguments
        assert message in outcome.stderr, arguments


def test_traces_that_do_not_fit_the_model_or_are_none(run, tmp_path):
    path = tmp_path / "other.npz"
    synthetic_trace(4, 16, 2, 20).save(path)
    outcome = run(str(path), "--ram", "1MiB", "-m", "demo")
    assert outcome.code == 1
    assert "the routing trace is of synthetic" in outcome.stderr
    path.write_text("no trace")
    assert run(str(path)).code == 1
    assert run(str(tmp_path / "none.npz")).code == 1
