"""The check for machines with a GPU runs whole models, on a simulated one here, and tells what it found."""

import json
import sys
from pathlib import Path

import pytest

from scripts import gpu_check
from tests.support import models

GPU = "sim:vram=64MiB,bw=500GB/s,link=20GB/s,tflops=20"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_model(tmp_path_factory.mktemp("gpu") / "tiny.gguf", models.spec_of("mixtral"), "Q4_K")


def rows(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[dict]:
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--json", "--quick", "--gpu", GPU, *arguments])
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    assert ended.value.code == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_model_on_a_simulated_gpu(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = ("--prompt-tokens", "20", "--answer-tokens", "8", "--threads", "1", "--caps", "8MiB", "32MiB")
    found = rows(capsys, monkeypatch, "--model", str(model), "--draft", str(model), *sizes)
    assert found[0]["gpu"].startswith("simulated")
    runs = {row["way"]: row for row in found if row["check"] == "end to end"}
    left_out = [row for row in found if row["check"] == "left out"]
    assert {"CPU", "all of the GPU", "CPU, drafts"} <= set(runs), left_out
    assert all(row["decode"] > 0 and row["prefill"] > 0 for row in runs.values())
    assert runs["all of the GPU"]["gpu_mib"] > 0
    goals = {row["goal"] for row in found if row["check"] == "goal"}
    assert "share of bandwidth" in goals
    assert all("ok" not in row for row in found)


def test_what_there_is_no_time_for_is_named(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = rows(capsys, monkeypatch, "--minutes", "0", "--caps", "32MiB")
    assert [row["model"] for row in found if row.get("reason") == "time is up"] == ["1B", "OLMoE", "Qwen3-30B-A3B"]
