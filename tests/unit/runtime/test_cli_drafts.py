"""Drafts on the command line: the same text, what is told of them, and what is refused."""

import json
import shutil

import pytest

from runtime.models import DEMO_DRAFT, DEMO_MODEL
from tests.support import models
from tests.support.command import strata

PROMPT = "The cat sat on the mat. The cat sat on the mat. The cat"
FAST = ("-m", "demo", "-t", "1", "--temp", "0", "--raw", "-p", PROMPT, "-n", "24")


@pytest.fixture
def run(capsys, monkeypatch):
    return lambda *arguments, stdin="": strata(capsys, monkeypatch, *arguments, stdin=stdin)


@pytest.fixture
def plain(run):
    return run("run", *FAST, "-q").stdout


@pytest.mark.parametrize("options", [("ngram",), ("auto",), (str(DEMO_DRAFT),), ("off", "--spec-synthetic", "0.8")])
def test_text_is_that_without_drafts_and_the_last_line_tells_of_them(options, run, plain):
    outcome = run("run", *FAST, "--draft", *options)
    assert outcome.stdout == plain
    assert "drafts (" in outcome.stderr.splitlines()[-1] or "drafts (" in outcome.stderr.splitlines()[-2]


def test_stats_and_json_carry_the_figures(run, plain):
    outcome = run("run", *FAST, "--draft", "ngram", "--stats", "-q", "--json")
    document = json.loads(outcome.stdout)
    assert document["text"] + "\n" == plain
    drafts = document["drafts"]
    assert drafts["draft"] == "n-gram"
    assert {"acceptance_rate", "acceptance_by_position", "tokens_per_pass", "draft_s", "verify_s", "gain"} <= set(
        drafts
    )
    assert "accepted by position" in outcome.stderr
    assert json.loads(run("run", *FAST, "-q", "--json").stdout)["drafts"] is None


def test_what_the_planner_expects_of_a_draft_model_is_shown_before(run):
    outcome = run("run", *FAST, "--draft", str(DEMO_DRAFT))
    assert "a drafted token" in " ".join(outcome.stderr.split())


def test_chat_and_batch_take_drafts(run, tmp_path):
    requests, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests.write_text(json.dumps({"prompt": PROMPT, "max_tokens": 6}) + "\n")
    outcome = run(
        "batch", str(requests), "-o", str(answers), "-m", "demo", "-t", "1", "--temp", "0", "--draft", "ngram"
    )
    assert outcome.code == 0
    assert "drafts (n-gram)" in outcome.stderr
    chat = run("chat", "-m", "demo", "-t", "1", "-n", "5", "--draft", "ngram", stdin="hello\n/stats\n/exit\n")
    assert "drafts (n-gram)" in chat.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--draft", "nothing.gguf"), "no draft nothing.gguf"),
        (("--draft", "ngram", "--draft-max", "99"), "--draft-max"),
        (("--spec-synthetic", "2"), "--spec-synthetic"),
        (("--spec-rejection",), "without drafts"),
        (("--draft", "ngram", "--loop", "sequential"), "sequential loop"),
    ],
)
def test_what_cannot_be_is_refused(options, words, run):
    outcome = run("run", *FAST, *options)
    assert outcome.code == 2
    assert words in " ".join(outcome.stderr.split())


def test_bench_measures_drafts_beside_plain_decoding(run):
    options = ("-m", "demo", "-t", "1", "-p", "0", "-n", "24", "-r", "1", "--draft", "ngram")
    rows = json.loads(run("bench", *options, "-o", "json").stdout)
    assert [row["draft"] for row in rows] == [None, "n-gram"]
    assert all(row["avg_ts"] > 0 and row["test"] == "tg24" for row in rows)
    table = run("bench", *options).stdout
    assert "tokens/pass" in table.splitlines()[0]
    assert len(table.splitlines()) == 4


def test_the_plan_shows_the_draft_that_it_chose(run, tmp_path):
    shown = " ".join(run("plan", "-m", "demo", "--draft", str(DEMO_DRAFT)).stdout.split())
    assert f"draft: {DEMO_DRAFT.name} on CPU" in shown
    assert "expected acceptance" in shown
    saved = tmp_path / "plan.json"
    document = json.loads(
        run("plan", "-m", "demo", "--draft", f"{DEMO_DRAFT},ngram", "--save", str(saved), "--json").stdout
    )
    assert document["draft"]["path"] == str(DEMO_DRAFT)
    assert document["draft"]["looks_up"] is True
    assert document["draft"]["ram_bytes"] > 0
    assert {"depth", "acceptance", "tokens_per_s", "plain_tokens_per_s", "device"} <= set(document["draft"])
    assert json.loads(run("plan", "-m", "demo", "--json").stdout)["draft"] is None
    by_plan = run("run", *FAST[4:], "-m", "demo", "--plan", str(saved), "--draft", "auto", "--json", "-q")
    assert json.loads(by_plan.stdout)["drafts"]["draft"] == f"n-gram and {DEMO_DRAFT.name}"
    unasked = run("run", *FAST[4:], "-m", "demo", "--plan", str(saved), "--json", "-q")
    assert json.loads(unasked.stdout)["drafts"]["draft"] == f"n-gram and {DEMO_DRAFT.name}"


def test_drafts_are_found_beside_a_model(tmp_path, run):
    for name, source in (("big.gguf", DEMO_MODEL), ("small.gguf", DEMO_DRAFT), ("other.gguf", None)):
        if source is None:
            models.write_model(tmp_path / name, models.spec_of("llama"), "Q8_0")
        else:
            shutil.copy(source, tmp_path / name)
    shown = " ".join(run("plan", "-m", str(tmp_path / "big.gguf"), "--draft", "auto").stdout.split())
    assert "small.gguf" in shown
    assert "other.gguf" not in shown


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--machine", "laptop", "--draft", "ngram"), "this machine"),
        (("--draft", "nothing.gguf"), "no draft nothing.gguf"),
    ],
)
def test_what_cannot_be_planned_is_refused(options, words, run):
    outcome = run("plan", "-m", "demo", *options)
    assert outcome.code == 2
    assert words in " ".join(outcome.stderr.split())
