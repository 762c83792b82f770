"""Compiling kernels and keeping them on disk."""

import ctypes
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from cpu_kernels import compiler
from cpu_kernels.isa import current
from cpu_kernels.simd import I64, Kernel

_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


def _trace(kernel: Kernel) -> None:
    with kernel.loop(kernel.begin, kernel.end) as index:
        kernel.store(kernel.load(I64, kernel.arg(0) + index * 8) + 1, kernel.arg(0) + index * 8)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, on disk and in memory; the folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiler, "_addresses", {})
    return tmp_path / "strata" / "kernels"


def _works(address: int) -> bool:
    values, args = np.arange(5), np.zeros(16, dtype=np.int64)
    args[0] = values.ctypes.data
    _FUNCTION(address)(args.ctypes.data, 1, 4)
    return values.tolist() == [0, 2, 3, 4, 4]


def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_addresses", {})


def test_a_second_process_would_load_what_the_first_compiled(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _works(compiler.kernel_address("plus_one", current(), _trace))
    assert len(list(fresh.glob("*.o"))) == 1
    assert not list(fresh.glob("*.tmp"))
    _forget(monkeypatch)
    monkeypatch.setattr(compiler, "_optimised", None)  # would fail
    start = time.perf_counter()
    assert _works(compiler.kernel_address("plus_one", current(), _trace))
    assert time.perf_counter() - start < 0.5


def test_an_address_is_found_once(fresh: Path) -> None:
    calls: list[int] = []

    def trace(kernel: Kernel) -> None:
        calls.append(1)
        _trace(kernel)

    addresses: list[int] = []
    threads = [
        threading.Thread(target=lambda: addresses.append(compiler.kernel_address("once", current(), trace)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(addresses)) == 1
    assert len(calls) == 1


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_damaged_files_are_compiled_anew(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, damage: bytes | None
) -> None:
    compiler.kernel_address("plus_one", current(), _trace)
    (path,) = fresh.glob("*.o")
    good = path.read_bytes()
    path.write_bytes(good[:-40] + bytes(40) if damage is None else damage)
    _forget(monkeypatch)
    with caplog.at_level(logging.WARNING, logger="strata.kernels"):
        assert _works(compiler.kernel_address("plus_one", current(), _trace))
    assert "damaged" in caplog.text
    assert path.read_bytes() == good


def test_a_cache_that_cannot_be_used_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr(compiler, "_addresses", {})
    with caplog.at_level(logging.WARNING, logger="strata.kernels"):
        assert _works(compiler.kernel_address("plus_one", current(), _trace))
    assert "cannot be read" in caplog.text
    assert "cannot be written" in caplog.text


def test_what_cannot_be_renamed_leaves_nothing_behind(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: Path, target: Path) -> Path:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", refuse)
    assert _works(compiler.kernel_address("plus_one", current(), _trace))
    assert not list(fresh.iterdir())
    assert "disk full" in caplog.text


def test_the_key_tells_kernels_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    isa = current()
    keys = {compiler._key("a", isa), compiler._key("b", isa), compiler._key("a", isa.for_floats())}
    monkeypatch.setattr(compiler, "_sources", lambda: "other sources")
    keys.add(compiler._key("a", isa))
    assert len(keys) == (4 if isa.for_floats() != isa else 3)


def test_the_key_is_the_same_in_every_process() -> None:
    program = "from cpu_kernels import compiler, isa; print(compiler._key('a', isa.choose('generic')))"
    keys = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(compiler.__file__).parents[1])},
            check=True,
            capture_output=True,
        ).stdout
        for seed in "123"
    }
    assert len(keys) == 1


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert compiler.cache_folder() == Path.home() / ".cache" / "strata" / "kernels"
