"""Facts of a machine read from a made-up system folder."""

from pathlib import Path

from planner.host import read_host


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="ascii")


def test_cores_of_two_kinds(tmp_path: Path) -> None:
    for number, capacity in enumerate((1024, 1024, 500, 500, 500)):
        _write(tmp_path / f"sys/devices/system/cpu/cpu{number}/cpu_capacity", f"{capacity}\n")
    for node in (0, 1):
        (tmp_path / f"sys/devices/system/node/node{node}").mkdir(parents=True)
    _write(tmp_path / "sys/firmware/acpi/platform_profile", "low-power\n")
    host = read_host(tmp_path)
    assert (host.performance_cores, host.efficiency_cores) == (2, 3)
    assert host.numa_nodes == 2
    assert host.power_mode == "low-power"


def test_clocks_tell_where_capacities_do_not(tmp_path: Path) -> None:
    for number, clock in enumerate((5000000, 3600000)):
        _write(tmp_path / f"sys/devices/system/cpu/cpu{number}/cpufreq/cpuinfo_max_freq", str(clock))
    host = read_host(tmp_path)
    assert (host.performance_cores, host.efficiency_cores) == (1, 1)


def test_a_system_that_tells_nothing(tmp_path: Path) -> None:
    host = read_host(tmp_path)
    assert host.performance_cores >= 1
    assert (host.efficiency_cores, host.numa_nodes, host.power_mode) == (0, 1, None)
