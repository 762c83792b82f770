"""The profile of a machine: measured once, stored, refused when it is another's, corrected by runs."""

import json
import logging
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpu_kernels.isa import current
from cpu_kernels.quant_types import quant_type, unknown_quant_type
from cpu_kernels.tuning import Choice, Family, Tuning
from gpu_kernels.bandwidth import GpuRates
from gpu_kernels.capabilities import GpuCapabilities
from planner import apart, document
from planner import profile as profiles
from planner.folders import cache_folder
from planner.host import available_threads, cpu_name
from planner.machine import KernelPoint
from planner.prediction import Residual
from planner.profile import Profile, load_or_measure, save, with_dequantize_rates, with_gpu_rates, with_kernel_rates
from planner.profile_kernels import KernelPoints
from planner.profile_learned import record_hits, record_observation
from tests.support.planning import profile, profile_here


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A stored profile of this machine, with figures no measurement would give."""
    path = tmp_path / "strata" / "profile.json"
    save(profile_here(), path)
    return path


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Profile]:
    """Measuring gives a fixed profile; the list counts how often."""
    calls: list[Profile] = []

    def measure() -> Profile:
        calls.append(replace(profile_here(), op_overhead_s=7e-6))
        return calls[-1]

    monkeypatch.setattr(profiles, "measure_apart", measure)
    return calls


def test_a_stored_profile_is_used(stored: Path, measured: list[Profile]) -> None:
    assert load_or_measure(stored) == profile_here()
    assert not measured


def test_measured_once_and_stored(tmp_path: Path, measured: list[Profile]) -> None:
    path = tmp_path / "profile.json"
    first = load_or_measure(path)
    assert load_or_measure(path) == first == measured[0]
    assert len(measured) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["profile.json"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", 0),
        ("cpu_name", "another"),
        ("software", "numpy 1"),
        ("threads", 4096),
        ("op_overhead_s", "fast"),
        ("matvec", []),
        ("read", [{"at": 1, "bytes_per_s": 0.0}]),
        ("matvec", [{"at": 0, "bytes_per_s": 1.0}]),
    ],
)
def test_a_foreign_or_broken_profile_is_measured_again(
    stored: Path, measured: list[Profile], key: str, value: object, caplog: pytest.LogCaptureFixture
) -> None:
    document = json.loads(stored.read_text())
    document[key] = value
    stored.write_text(json.dumps(document))
    with caplog.at_level(logging.INFO, "strata"):
        assert load_or_measure(stored) == measured[0]
    assert "measuring again" in caplog.text
    assert load_or_measure(stored) == measured[0]
    assert len(measured) == 1


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[]"])
def test_a_corrupt_file_is_measured_again(stored: Path, measured: list[Profile], data: bytes) -> None:
    stored.write_bytes(data)
    assert load_or_measure(stored) == measured[0]


def test_a_folder_that_cannot_be_written_is_no_error(
    tmp_path: Path, measured: list[Profile], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.INFO, "strata"):
        assert load_or_measure(tmp_path / "file" / "profile.json") == measured[0]
    assert "not kept" in caplog.text


def test_nothing_half_written_is_left(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        save(replace(profile(), op_overhead_s=float("nan")), tmp_path / "profile.json")
    assert not list(tmp_path.iterdir())


def test_where_it_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "strata"
    for value in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_folder() == Path.home() / ".cache" / "strata"


def test_measuring_gives_sane_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles.bandwidth, "buffer_bytes", lambda: 8 << 20)
    found = profiles.measure()
    assert found.cpu_name
    assert found.read[0].at == 1
    assert found.matvec[-1].at >= 8 << 20
    assert found.read_bytes_per_s > 1e8
    assert found.matmul_flops_per_s > 1e8
    assert 1e-8 < found.op_overhead_s < 1e-3


def test_measuring_apart_takes_no_memory_here(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = document.dumps(profile_here())
    monkeypatch.setattr(
        apart.subprocess, "run", lambda command, **options: subprocess.CompletedProcess(command, 0, answer, "")
    )
    assert profiles.measure_apart() == profile_here()


def test_measuring_apart_falls_back_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(profiles, "measure", profile)
    monkeypatch.setattr(profiles.sys, "executable", "/bin/false")
    assert profiles.measure_apart() == profile()
    assert "measuring in this one" in caplog.text


@pytest.mark.slow
def test_the_whole_measurement_is_short() -> None:
    start = time.perf_counter()
    found = profiles.measure_apart()
    assert found.threads == available_threads()
    assert time.perf_counter() - start < 20  # about 1.5 s on an idle machine


def test_rates_between_and_beyond_the_points() -> None:
    machine = profile(threads=4)
    assert machine.read_rate(1) == 10e9
    assert machine.read_rate(2) == pytest.approx(25e9)
    assert machine.read_rate(4) == machine.read_rate(64) == machine.read_bytes_per_s == 40e9
    assert machine.matvec_rate(1, 4) == machine.matvec_rate(4 << 20, 4) == 80e9
    assert machine.matvec_rate(1 << 40, 4) == 40e9
    assert machine.matvec_rate(1 << 40, 1) == 10e9
    assert machine.matvec_rate(1, 1) == 20e9
    assert machine.matvec_rate(1, 2) == 40e9
    assert replace(machine, threads=1).matvec_rate(1, 1) == 20e9
    assert 40e9 < machine.matvec_rate(32 << 20, 4) < 80e9


def test_dequantize_rates_are_measured_for_new_types_alone(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    before = replace(profile(), dequantize_bytes_per_s={"Q8_0": 1.0})
    types = [quant_type("Q8_0"), quant_type("Q4_K"), unknown_quant_type(99)]
    after = with_dequantize_rates(before, types, path)
    assert after.dequantize_bytes_per_s.keys() == {"Q8_0", "Q4_K"}
    assert after.dequantize_bytes_per_s["Q8_0"] == 1.0
    assert after.dequantize_bytes_per_s["Q4_K"] > 1e5
    assert path.exists()
    path.unlink()
    assert with_dequantize_rates(after, types, path) is after
    assert not path.exists()


def test_gpu_rates_are_measured_once_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = GpuRates("a GPU", 1e12, 1e13, 5e-6)
    monkeypatch.setattr(profiles, "measure_rates", lambda name, device: replace(rates, name=name))
    gpu = GpuCapabilities("a GPU", 1 << 30, 1 << 30, (8, 0), "cuda:0")
    found = with_gpu_rates(profile(), gpu, tmp_path / "profile.json")
    assert found.gpu == rates
    assert with_gpu_rates(found, gpu, tmp_path / "other.json") is found
    other = with_gpu_rates(found, replace(gpu, name="another"), tmp_path / "profile.json")
    assert other.gpu is not None
    assert other.gpu.name == "another"


def test_runs_correct_the_next_prediction(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    machine = record_observation(profile(), ["this", "any"], predicted_s=0.1, measured_s=0.2, path=path)
    assert machine.residual(["this", "any"]) == Residual(2.0, 1)
    machine = record_observation(machine, ["any"], predicted_s=0.1, measured_s=0.05, path=path)
    assert machine.residual(["any"]).factor == pytest.approx(1.0)
    assert machine.residual(["this", "any"]).factor == 2.0
    assert machine.residual(["other"]) == Residual(1.0, 0)
    assert json.loads(path.read_text())["residuals"]["any"]["runs"] == 2


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8))
def test_corrections_stay_bounded(times: list[float]) -> None:
    machine = profile()
    for seconds in times:
        machine = record_observation(machine, ["key"], predicted_s=1.0, measured_s=seconds, path=Path("/proc/no/file"))
    assert 0.2 <= machine.residuals["key"].factor <= 5.0
    assert machine.residuals["key"].runs == len(times)


@pytest.mark.parametrize("pair", [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0), (float("nan"), 1.0)])
def test_times_must_be_positive(pair: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="positive"):
        record_observation(profile(), ["key"], predicted_s=pair[0], measured_s=pair[1])


def test_threads_follow_the_control_group(tmp_path: Path) -> None:
    assert available_threads(tmp_path) >= 1
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("50000 100000\n")
    assert available_threads(tmp_path) == 1


def test_name_of_the_processor(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("processor\t: 0\nmodel name\t: Fast One\n")
    assert cpu_name(tmp_path) == "Fast One"
    assert cpu_name(tmp_path / "nowhere")


def test_sample_bytes_are_ordinary_numbers_in_float_formats() -> None:
    for dtype in (np.float16, np.float32, np.float64):
        value = np.full(8, profiles._SAMPLE_BYTE, np.uint8).view(dtype)[0]
        assert 1e-60 < value < 1


def test_learned_hit_rates_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    learned = record_hits(profile_here(), "a model", 272, 0.27, path)
    learned = record_hits(learned, "a model", 300, 0.31, path)
    assert load_or_measure(path) == learned
    assert learned.hits["a model"] == ((272, 0.27), (300, 0.31))


@pytest.mark.parametrize("point", ["[1]", "[1, 0.5, 2]", "[0.5, 1]"])
def test_hit_rates_of_another_shape_are_refused(point: str, tmp_path: Path) -> None:
    text = document.dumps(profile_here()).replace('"hits": {}', f'"hits": {{"a model": [{point}]}}')
    with pytest.raises(ValueError, match=r"hits\.a model\[0\]"):
        document.loads(profiles.Profile, text)


def test_nothing_is_measured_or_lost_by_a_caller_with_an_old_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, asked = tmp_path / "profile.json", []
    old = replace(profile_here(), kernels={}, tuning=None, dequantize_bytes_per_s={})

    def measured(names: list[str], _: int) -> KernelPoints:
        asked.append(names)
        point = (KernelPoint(1, 1, 1e9, 1e9),)
        choice = Choice(Family.DOT, current().tile_columns)
        return KernelPoints(dict.fromkeys(names, point), Tuning(current().name, dict.fromkeys(names, choice)))

    monkeypatch.setattr(profiles.profile_kernels, "measure_apart", measured)
    first, both = [quant_type("Q8_0")], [quant_type("Q8_0"), quant_type("Q4_0")]
    with_kernel_rates(old, first, path)
    with_dequantize_rates(old, first, path)
    found = with_kernel_rates(old, both, path)
    assert asked == [["Q8_0"], ["Q4_0"]]
    assert found.dequantize_bytes_per_s.keys() == {"Q8_0"}
    assert load_or_measure(path) == found
    other = replace(old, threads=old.threads + 1)  # another machine's
    with_kernel_rates(other, first, path)
    assert asked[2:] == [["Q8_0"]]
