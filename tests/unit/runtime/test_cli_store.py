"""`strata pack`, `strata verify` and `strata store`."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from offload.gguf import GGUFFile
from runtime.architectures import describe
from runtime.model_store import plan_store
from tests.support import models
from tests.support.command import Outcome, strata

Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda *arguments: strata(capsys, monkeypatch, *arguments)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return models.write_model(tmp_path / "tiny.gguf", models.FAMILIES["mixtral"], "Q8_0")


def store_of(model: Path, root: Path) -> Path:
    with GGUFFile.open(model) as gguf:
        return plan_store(gguf, describe(gguf), root).folder


def test_a_store_is_made_checked_listed_and_removed(run: Run, model: Path, tmp_path: Path) -> None:
    folder = store_of(model, tmp_path / "cache" / "strata" / "stores")
    made = run("pack", "-m", str(model), "--threads", "2")
    assert made.code == 0, made.stderr
    assert f"{folder}: 24 bundles, " in made.stdout
    assert f"{folder} is there already" in run("pack", "-m", str(model)).stdout
    for name in (str(model), folder.name, str(folder)):
        checked = run("verify", name)
        assert checked.code == 0, checked.stderr
        assert "24 bundles" in checked.stdout
        assert "all as they were written" in checked.stdout
    listed = run("store", "ls").stdout
    assert folder.name in listed
    assert "ready" in listed
    assert f"removed {folder.name}" in run("store", "rm", folder.name).stdout
    assert json.loads(run("store", "ls", "--json").stdout) == []
    assert "no stores in" in run("store", "ls").stdout


def test_damage_is_named_and_packed_anew(run: Run, model: Path, tmp_path: Path) -> None:
    root = tmp_path / "stores"
    folder = store_of(model, root)
    assert run("pack", "-m", str(model), "--folder", str(root)).code == 0
    with (folder / "data.bin").open("r+b") as file:
        file.write(b"\x12\x34")
    damaged = run("verify", str(model), "--folder", str(root))
    assert damaged.code == 1
    assert "1 of 24 bundles are damaged: blk.0.ffn_gate_exps+ffn_up_exps.0" in damaged.stderr
    assert "strata store rm" in damaged.stderr
    (folder / "manifest.json").write_bytes(b"{}")
    entry = json.loads(run("store", "ls", "--json", "--folder", str(root)).stdout)[0]
    assert (entry["name"], entry["state"]) == (folder.name, "damaged")
    again = run("pack", "-m", str(model), "--folder", str(root))
    assert again.code == 0
    assert "the manifest is damaged: 'format' is missing: making it again" in again.stderr
    assert run("verify", str(model), "--folder", str(root)).code == 0


def test_stores_of_changed_models_are_stale(run: Run, model: Path) -> None:
    run("pack", "-m", str(model))
    assert run("store", "rm", "--stale").stdout == ""
    os.utime(model, ns=(1, 1))
    assert json.loads(run("store", "ls", "--json").stdout)[0]["state"] == "source changed"
    missing = run("verify", str(model))
    assert missing.code == 2
    assert "has no store in" in missing.stderr
    assert "removed tiny-" in run("store", "rm", "--stale").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pack", "-m", "nothing.gguf"), "there is no file nothing.gguf"),
        (("verify", "nothing"), "there is no file nothing"),
        (("verify", "."), ". is not a finished store"),
        (("store", "rm"), "no store is named"),
        (("store", "rm", "nothing"), "there is no store nothing in"),
    ],
)
def test_what_is_not_there_is_named(run: Run, arguments: tuple[str, ...], message: str) -> None:
    outcome = run(*arguments)
    assert outcome.code == 2
    assert message in outcome.stderr
    assert "hint:" in outcome.stderr
