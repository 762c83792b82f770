"""Sizes, what users allow, and the limits of control groups."""

from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_kernels.capabilities import GpuCapabilities
from offload.errors import RequestError
from planner.budget import (
    GIB,
    MIB,
    PACKED_PROCESS_BYTES,
    Budget,
    cgroup_cpu_quota,
    cgroup_free_bytes,
    format_size,
    free_ram,
    measure_budget,
    parse_budget,
    parse_size,
)

MACHINE = Budget(16 * GIB, 4 * GIB, "free memory", "a GPU", 512 * MIB, 256 * MIB)
GPU = GpuCapabilities("a GPU", 8 * GIB, 6 * GIB, (8, 0), "cuda:0")


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("8GiB", 8 * GIB),
        ("8GB", 8 * GIB),
        ("8g", 8 * GIB),
        (" 512 MiB ", 512 * MIB),
        ("1.5G", 1536 * MIB),
        ("1t", 1024 * GIB),
        ("64k", 65536),
        ("0", 0),
        ("123", 123),
        ("123B", 123),
    ],
)
def test_sizes(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "8 X", "8GiBB", "nan", "1.", "٣G", "9" * 400, "9999999t"])
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536 * MIB, "1.5 GiB"), (300 * MIB, "300 MiB")],
)
def test_sizes_are_written_for_people(num_bytes: int, text: str) -> None:
    assert format_size(num_bytes) == text


@given(st.integers(0, 1 << 59))
def test_written_sizes_read_back_nearly(num_bytes: int) -> None:
    assert parse_size(format_size(num_bytes)) == pytest.approx(num_bytes, rel=0.06)


def test_budget_of_both_memories() -> None:
    budget = parse_budget("ram=8GiB, GPU=2GiB", MACHINE)
    assert (budget.ram_bytes, budget.gpu_bytes) == (8 * GIB, 2 * GIB)
    assert (budget.ram_source, budget.gpu_source) == ("--budget", "--budget")
    assert (budget.ram_margin_bytes, budget.gpu_margin_bytes) == (0, 0)


def test_what_a_budget_does_not_name_is_the_machines() -> None:
    budget = parse_budget("gpu=0", MACHINE)
    assert budget == replace(MACHINE, gpu_bytes=0, gpu_source="--budget", gpu_margin_bytes=0)
    assert parse_budget("ram=1GiB").ram_bytes == GIB


@pytest.mark.parametrize("text", ["", "8GiB", "ram", "ram=", "vram=8GiB", "ram=8GiB,ram=4GiB", "ram=8GiB,", "ram=x"])
def test_nonsense_budgets_are_refused(text: str) -> None:
    with pytest.raises(RequestError):
        parse_budget(text, MACHINE)


def test_a_run_may_not_use_more_than_there_is() -> None:
    asked = parse_budget("ram=64GiB,gpu=1GiB", MACHINE)
    assert asked.within(MACHINE) == Budget(16 * GIB, GIB, "free memory", "--budget", 512 * MIB, 0)
    assert parse_budget("gpu=9GiB", MACHINE).within(MACHINE) == MACHINE


def test_this_machines_budget() -> None:
    budget = measure_budget(GPU)
    assert 0 < budget.ram_margin_bytes <= budget.ram_bytes <= psutil.virtual_memory().total
    assert (budget.gpu_bytes, budget.gpu_source) == (6 * GIB, "a GPU")
    assert budget.gpu_margin_bytes < budget.gpu_bytes


def test_what_a_process_holds_beside_is_not_for_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = {f"{V2}/app/memory.max": f"{2 * GIB}\n", f"{V2}/app/memory.current": f"{GIB}\n"}
    root = write(tmp_path, {"proc/self/cgroup": "0::/app\n", **group})
    held = psutil.Process().memory_info()
    for rss, own in ((100 * MIB, 100 * MIB), (GIB, PACKED_PROCESS_BYTES)):
        info = held._replace(rss=rss)
        monkeypatch.setattr(psutil.Process, "memory_info", lambda self, info=info: info)
        assert measure_budget(root=root).ram_bytes == GIB + own


def write(root: Path, files: dict[str, str]) -> Path:
    """The files of a made-up machine below `root`."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/memory"


def test_version_2_takes_the_tightest_level(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/user.slice/app\n",
            f"{V2}/user.slice/memory.max": f"{4 * GIB}\n",
            f"{V2}/user.slice/memory.current": f"{3 * GIB}\n",
            f"{V2}/user.slice/memory.stat": f"anon {2 * GIB}\ninactive_file {GIB}\nactive_file 0\n",
            f"{V2}/user.slice/app/memory.max": f"{3 * GIB}\n",
            f"{V2}/user.slice/app/memory.current": f"{GIB // 2}\n",
        },
    )
    assert cgroup_free_bytes(root) == (2 * GIB, "control group limit of 4.0 GiB")


def test_free_ram_is_the_tighter_of_machine_and_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/app\n",
            f"{V2}/app/memory.high": f"{4 * GIB}\n",
            f"{V2}/app/memory.current": f"{3 * GIB}\n",
        },
    )
    for available, expected in (
        (8 * GIB, (GIB, "control group limit of 4.0 GiB")),
        (GIB // 2, (GIB // 2, "free memory")),
    ):
        memory = psutil.virtual_memory()._replace(available=available)
        monkeypatch.setattr(psutil, "virtual_memory", lambda memory=memory: memory)
        assert free_ram(root) == expected


def test_version_2_soft_limit_counts(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/app\n",
            f"{V2}/app/memory.max": "max\n",
            f"{V2}/app/memory.high": f"{2 * GIB}\n",
            f"{V2}/app/memory.current": f"{GIB}\n",
        },
    )
    assert cgroup_free_bytes(root) == (GIB, "control group limit of 2.0 GiB")


def test_no_limit_anywhere(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/app\n0::/app\n",
            f"{V2}/unified/app/memory.max": "max\n",
            f"{V1}/app/memory.limit_in_bytes": "9223372036854771712\n",
            f"{V1}/app/memory.usage_in_bytes": "1000\n",
        },
    )
    assert cgroup_free_bytes(root) is None
    assert cgroup_cpu_quota(root) is None


def test_version_1_beside_an_empty_version_2(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "4:cpu,memory:/docker/abc\n1:name=systemd:/\n0::/\n",
            f"{V2}/unified/cgroup.procs": "",
            f"{V2}/cpu,memory/docker/abc/memory.limit_in_bytes": f"{2 * GIB}\n",
            f"{V2}/cpu,memory/docker/abc/memory.usage_in_bytes": f"{GIB}\n",
            f"{V2}/cpu,memory/docker/abc/memory.stat": f"cache 5\ntotal_inactive_file {GIB // 2}\n",
            f"{V2}/cpu,memory/docker/abc/cpu.cfs_quota_us": "150000\n",
            f"{V2}/cpu,memory/docker/abc/cpu.cfs_period_us": "100000\n",
        },
    )
    assert cgroup_free_bytes(root) == (3 * GIB // 2, "control group limit of 2.0 GiB")
    assert cgroup_cpu_quota(root) == 1.5


def test_a_container_sees_its_group_as_the_root(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/outside/name\n",
            f"{V2}/memory.max": f"{GIB}\n",
            f"{V2}/memory.current": f"{2 * GIB}\n",
            f"{V2}/cpu.max": "50000 100000\n",
        },
    )
    assert cgroup_free_bytes(root) == (0, "control group limit of 1.0 GiB")
    assert cgroup_cpu_quota(root) == 0.5


def test_broken_control_group_files_are_passed_over(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "nonsense\n0::/../../etc\n",
            f"{V2}/memory.max": "lots\n",
            f"{V2}/cpu.max": "max 100000\n",
        },
    )
    assert cgroup_free_bytes(root) is None
    assert cgroup_cpu_quota(root) is None
    assert cgroup_free_bytes(tmp_path / "nowhere") is None
