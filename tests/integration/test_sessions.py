"""Sessions that are closed and opened again: the same answers as from one that never was, in processes of their own."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from runtime.engine import Engine
from runtime.models import DEMO_DRAFT, DEMO_MODEL
from runtime.session_saved import SavedSession
from runtime.speculative.options import DraftOptions
from tests.support.models import FAMILIES, VARIANTS, spec_of, write_model
from tests.support.sessions import NAME, answer, first_turn, tokens

QUESTIONS = ("The sun rose over the hills and the man began to walk.", "And what did he see?", "Who was there?")
CHAT = ("chat", "-m", "demo", "-t", "1", "-c", "512", "--gpu", "off", "--temp", "0", "-n", "40", "-q")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "runtime.cli", *arguments]


def chat(folder: Path, questions: Sequence[str], *options: str) -> str:
    """What a process of its own says."""
    done = subprocess.run(
        command(*CHAT, *options),
        check=True,
        capture_output=True,
        text=True,
        input="".join(f"{question}\n" for question in questions),
        env={**os.environ, "XDG_DATA_HOME": str(folder)},
    )
    return done.stdout


def test_a_chat_of_three_processes_says_the_same_as_one_though_the_first_is_killed(tmp_path: Path) -> None:
    whole = chat(tmp_path, QUESTIONS)
    document = tmp_path / "strata" / "sessions" / "tale" / "session.json"
    with subprocess.Popen(
        command(*CHAT, "--session", "tale"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "XDG_DATA_HOME": str(tmp_path)},
    ) as process:
        assert process.stdin is not None
        process.stdin.write(f"{QUESTIONS[0]}\n".encode())
        process.stdin.flush()
        while not document.exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    messages = json.loads(document.read_text())["messages"]
    assert len(messages) == 2
    assert whole.lstrip().startswith(messages[1]["content"])
    rest = "".join(chat(tmp_path, [question], "--session", "tale") for question in QUESTIONS[1:])
    assert rest
    assert whole.endswith(rest)


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen2moe", "gemma3", "phi3-long", "qwen3-wide-heads"])
def test_every_kind_of_model_goes_on_where_it_was(tmp_path: Path, name: str) -> None:
    assert name in FAMILIES | VARIANTS
    path = write_model(tmp_path / f"{name}.gguf", spec_of(name))
    with Engine(path, threads=1, context_tokens=256, gpu="off") as engine:
        turn = first_turn(engine, tmp_path / "sessions")
        expected, _ = answer(engine, turn)
    with (
        Engine(path, threads=2, context_tokens=512, gpu="off") as engine,
        SavedSession(NAME, tmp_path / "sessions") as saved,
    ):
        pieces, computed = answer(engine, turn, saved)
    assert tokens(pieces) == tokens(expected)
    assert computed == len(turn) - 128


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_layers_on_a_gpu_go_on_where_they_were(tmp_path: Path, name: str) -> None:
    path = write_model(tmp_path / f"{name}.gguf", spec_of(name))
    gpu = "sim:vram=2GiB,bw=10000GB/s,link=10000GB/s,tflops=1000,launch=0us,link_latency=0us"
    with Engine(path, threads=1, context_tokens=256, gpu=gpu, loop="hybrid") as engine:
        turn = first_turn(engine, tmp_path / "sessions")
        expected, _ = answer(engine, turn)
        with SavedSession(NAME, tmp_path / "sessions") as saved:
            pieces, computed = answer(engine, turn, saved)
    assert [piece.token_id for piece in pieces] == [piece.token_id for piece in expected]
    assert computed == len(turn) - 128
    with Engine(path, threads=1, context_tokens=256, gpu="off") as engine:
        with SavedSession(NAME, tmp_path / "sessions") as saved:
            reason = saved.use(engine.rows_keys(), engine.session().kv)
        assert reason is not None
        assert "computed by the hybrid loop" in reason


@pytest.mark.parametrize(("keys", "values"), [("q8_0", "q8_0"), ("q8_0", "q4_0"), ("kivi4", "kivi2")])
def test_coded_rows_go_on_and_are_refused_by_other_types(tmp_path: Path, keys: str, values: str) -> None:
    path = write_model(tmp_path / "llama.gguf", spec_of("llama"))
    coded = Engine(path, threads=1, context_tokens=256, gpu="off", cache_type_k=keys, cache_type_v=values)
    with coded as engine:
        turn = first_turn(engine, tmp_path / "sessions")
        with SavedSession(NAME, tmp_path / "sessions") as saved:
            pieces, computed = answer(engine, turn, saved)
        assert computed == len(turn) - 128
        assert tokens(pieces) == tokens(answer(engine, turn)[0])
    with (
        Engine(path, threads=1, context_tokens=256, gpu="off") as engine,
        SavedSession(NAME, tmp_path / "sessions") as saved,
    ):
        reason = saved.use(engine.rows_keys(), engine.session().kv)
        assert reason is not None
        assert reason.startswith("its layout is")
        assert answer(engine, turn, saved)[1] == len(turn)


@pytest.mark.parametrize("draft", ["ngram", str(DEMO_DRAFT)])
def test_drafts_go_on_in_a_restored_session(tmp_path: Path, draft: str) -> None:
    options = DraftOptions(draft, most=4, forced=True)
    with Engine(DEMO_MODEL, threads=1, context_tokens=256, gpu="off") as engine:
        turn = first_turn(engine, tmp_path / "plain")
        expected, _ = answer(engine, turn)
    with Engine(DEMO_MODEL, threads=1, context_tokens=256, gpu="off", draft=options) as engine:
        assert first_turn(engine, tmp_path / "drafted") == turn
        for folder in ("plain", "drafted"):
            with SavedSession(NAME, tmp_path / folder) as saved:
                pieces, computed = answer(engine, turn, saved)
            assert tokens(pieces) == tokens(expected)
            assert computed == len(turn) - 128
