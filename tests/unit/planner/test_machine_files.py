"""Described machines: the ones that come with the package, and what is wrong with others."""

import json
from pathlib import Path
from typing import Any

import pytest

from cpu_kernels.formats import has_panel_format
from cpu_kernels.quant_types import QUANT_TYPES
from offload.errors import RequestError
from planner import document
from planner.machine import Machine
from planner.machine_files import COLUMNS, MACHINES, MACHINES_DIRECTORY, SHARES, load_machine


def described(name: str = "laptop") -> dict[str, Any]:
    value: dict[str, Any] = json.loads((MACHINES_DIRECTORY / f"{name}.json").read_text(encoding="utf-8"))
    return value


def written(tmp_path: Path, value: Any) -> Path:
    path = tmp_path / "machine.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def test_five_machines_come_with_the_package():
    assert MACHINES == ("desktop", "laptop", "laptop-no-gpu", "mini-pc", "workstation")
    assert sum(load_machine(name).gpu is None for name in MACHINES) == 2


@pytest.mark.parametrize("name", MACHINES)
def test_each_loads_whole_and_says_where_its_figures_are_from(name: str):
    machine = load_machine(name)
    assert "CPU:" in machine.source
    assert "Flash:" in machine.source
    assert ("GPU:" in machine.source) == (machine.gpu is not None)
    assert machine.cpu.name in machine.source
    assert [point.at for point in machine.cpu.read][-1] == machine.cpu.threads
    assert document.loads(Machine, document.dumps(machine)) == machine
    assert load_machine(f"{name}.json") == machine


@pytest.mark.parametrize("name", MACHINES)
def test_each_has_kernels_of_every_type(name: str):
    cpu = load_machine(name).cpu
    types = {kind.name for kind in QUANT_TYPES.values() if has_panel_format(kind)}
    assert set(cpu.kernels) == types == set(SHARES)
    for points in cpu.kernels.values():
        assert {(point.threads, point.columns) for point in points} == {
            (read.at, columns) for read in cpu.read for columns in COLUMNS
        }
        for point in points:
            read = next(read for read in cpu.read if read.at == point.threads)
            assert point.bytes_per_s <= 1.001 * read.bytes_per_s
    alone, eight, _, many = cpu.kernels["Q4_0"][-4:]
    assert alone.bytes_per_s == pytest.approx(SHARES["Q4_0"][0] * cpu.read[-1].bytes_per_s)
    assert alone.macs_per_s < eight.macs_per_s <= 1.001 * many.macs_per_s


def test_a_description_without_kernels_has_them_derived_from_float32(tmp_path: Path):
    value = described()
    value["cpu"]["kernels"] = {}
    machine = load_machine(written(tmp_path, value))
    assert machine.cpu.kernels["Q4_0"][-1].macs_per_s == pytest.approx(0.95 * machine.cpu.flops_per_s)


def test_stated_points_stay(tmp_path: Path):
    value = described()
    stated = {"threads": 4, "columns": 1, "bytes_per_s": 1e9, "macs_per_s": 5e8}
    value["cpu"]["kernels"]["Q8_0"] = [stated]
    points = load_machine(written(tmp_path, value)).cpu.kernels["Q8_0"]
    assert [point.bytes_per_s for point in points if (point.threads, point.columns) == (4, 1)] == [1e9]
    assert len(points) == len(COLUMNS) * 3


def test_a_file_goes_before_a_machine_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "laptop.json").write_text(json.dumps(described("desktop")), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert load_machine("laptop.json") == load_machine("desktop")
    assert load_machine("laptop").name.startswith("Laptop")


def test_extreme_machines_load(tmp_path: Path):
    value = described()
    value["gpu"]["memory_bytes"] = 0
    value["ram_bytes"] = 2 << 30
    value["cpu"].update(threads=1, read=[{"at": 1, "bytes_per_s": 5e9}], kernels={})
    value["flash"]["points"] = [{"read_bytes": 4096, "depth": 1, "direct": False, "bytes_per_s": 1e7}]
    assert load_machine(written(tmp_path, value)).ram_bytes == 2 << 30
    value["gpu"] = value["flash"] = None
    assert load_machine(written(tmp_path, value)).gpu is None


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (("ram_bytes",), "16 GiB", "ram_bytes must be a whole number, not a string"),
        (("ram_bytes",), -1, "ram_bytes is -1: it must be at least 0"),
        (("cpu", "threads"), 0, "cpu.threads is 0: it must be more than 0"),
        (("cpu", "read"), [], "cpu.read must have points of a rising number of threads"),
        (("cpu", "flops_per_s"), 0.0, "cpu.flops_per_s is 0.0: it must be more than 0"),
        (("cpu", "kernels", "Q4_0", 0, "macs_per_s"), 0, r"cpu.kernels.Q4_0\[0\].macs_per_s is 0.0"),
        (("flash", "points"), [], "flash.points is empty"),
        (("flash", "points", 1, "bytes_per_s"), -4.0, r"flash.points\[1\].bytes_per_s is -4.0"),
        (("gpu", "link_to_bytes_per_s"), 0, "gpu.link_to_bytes_per_s is 0.0"),
        (("gpu", "speed"), 1, "unknown key gpu.speed"),
    ],
)
def test_wrong_fields_are_named(tmp_path: Path, place: tuple[Any, ...], wrong: Any, message: str):
    value = described()
    target = value
    for step in place[:-1]:
        target = target[step]
    target[place[-1]] = wrong
    path = written(tmp_path, value)
    with pytest.raises(RequestError, match=message) as caught:
        load_machine(path)
    assert str(path) in str(caught.value)
    assert "laptop-no-gpu" in (caught.value.hint or "")


def test_what_is_no_description(tmp_path: Path):
    with pytest.raises(RequestError, match="no machine 'laptob': No such file or directory") as caught:
        load_machine("laptob")
    assert "desktop, laptop, laptop-no-gpu, mini-pc, workstation" in (caught.value.hint or "")
    with pytest.raises(RequestError, match="Is a directory"):
        load_machine(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RequestError, match="it is not text"):
        load_machine(tmp_path / "binary")
    with pytest.raises(RequestError, match="not a machine description"):
        load_machine(written(tmp_path, "{"))
    missing = described()
    del missing["cpu"]["threads"]
    with pytest.raises(RequestError, match=r"cpu\.threads is missing"):
        load_machine(written(tmp_path, missing))
