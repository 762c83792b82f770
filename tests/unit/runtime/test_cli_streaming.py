"""What a run says about weights from flash, and the option for guesses."""

import json
from dataclasses import replace

import pytest

from offload.cache_counts import CacheCounts
from offload.gguf import GGUFFile
from offload.prefetch_gate import Trial
from offload.tiers import Tier
from planner.model_shape import ModelShape, UnitKind
from planner.solve import plan_here
from planner.streamed import all_slots, streamed_needs
from runtime.cli.streaming import describe_streaming
from runtime.models import DEMO_MODEL
from tests.support.command import strata

MIB = 1 << 20
FAST = ("-t", "1", "--temp", "0", "-p", "Once upon a time", "-n", "8")


@pytest.fixture
def run(capsys, monkeypatch):
    return lambda *arguments: strata(capsys, monkeypatch, *arguments)


@pytest.fixture
def streamed_plan(tmp_path):
    """A plan of the built-in model with slots for half of its experts."""
    with GGUFFile.open(DEMO_MODEL) as gguf:
        plan, shape = plan_here(gguf, context_tokens=64, threads=1, gpu="off"), ModelShape.from_gguf(gguf)
    slots, chunk = all_slots(shape) // 2, plan.settings.prefill_chunk_tokens
    plan = replace(
        plan,
        settings=replace(plan.settings, stream_slots=slots),
        needs=streamed_needs(shape, plan.budget, context_tokens=64, chunk_tokens=chunk, slots=slots),
        placements=tuple(
            replace(unit, tier=Tier.FLASH) if unit.kind is UnitKind.EXPERTS else unit for unit in plan.placements
        ),
    )
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    return path


@pytest.mark.parametrize("mode", ["off", "on", "auto"])
def test_a_streamed_run_tells_what_it_read(run, streamed_plan, mode):
    outcome = run("run", "--plan", str(streamed_plan), "-m", "demo", *FAST, "--prefetch", mode, "--json")
    assert outcome.code == 0, outcome.stderr
    assert "read from flash" in outcome.stderr
    document = json.loads(outcome.stdout)
    streamed = document["streamed"]
    assert streamed["stream_bytes_read"] > 0
    assert 0 <= streamed["prefetch_recall"] <= 1
    assert streamed["prefetch_is_faster"] is None, "no trial was that short"
    if mode != "on":
        assert streamed["prefetch_experts"] == 0
    resident = json.loads(run("run", "-m", "demo", *FAST, "--json").stdout)
    assert resident["streamed"] is None
    assert document["token_ids"] == resident["token_ids"]


def test_bench_has_columns_for_streams(run, streamed_plan):
    arguments = ("bench", "--plan", str(streamed_plan), "-p", "0", "-n", "4", "-r", "1", "-o", "jsonl")
    row = json.loads(run(*arguments).stdout)
    assert row["stream_bytes_read"] > 0
    assert {"stream_hit_rate", "prefetch_recall", "prefetch_wasted_bytes", "prefetch_is_faster"} <= row.keys()
    assert "stream_bytes_read" not in json.loads(run("bench", *arguments[3:]).stdout)


def test_the_line_says_what_guesses_did():
    counts = CacheCounts(100, 30, 0, 512 * MIB, 1.0, 12, 10, 7 * MIB, Trial(0.0971, 0.1113, 0.002))
    assert describe_streaming(counts) == (
        "512 MiB read from flash; 25% of what was lacking was read ahead on a guess, 7.0 MiB in vain; "
        "guesses are on: 97.1 ms a token with them, 111 without"
    )
    assert describe_streaming(CacheCounts(bytes_read=MIB)) == "1.0 MiB read from flash"
    lost = CacheCounts(bytes_read=MIB, trial=Trial(0.2, 0.1, 0.0))
    assert describe_streaming(lost).endswith("guesses are off: 200 ms a token with them, 100 without")


def test_an_unknown_mode_is_refused(run):
    assert run("run", "-m", "demo", *FAST, "--prefetch", "sometimes").code == 2
