"""The speed of attention by type of the KV cache is measured once and kept."""

from pathlib import Path

import pytest

from cpu_kernels.kv_policy import KVPolicy
from cpu_kernels.kv_types import KVType
from planner import profile_attention
from planner.machine import AttentionPoint
from planner.profile import stored
from planner.profile_attention import AttentionRates, measure, with_attention_rates
from tests.support.planning import profile_here

measure_apart = profile_attention.measure_apart  # which other tests do without


def test_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_attention, "RAM_BYTES", 1 << 20)
    monkeypatch.setattr(profile_attention, "DEPTH_TOKENS", 2560)
    monkeypatch.setattr(profile_attention, "_SECONDS_A_POINT", 0.01)
    found = measure(["f16", "kivi4"], 2).types
    assert [point.threads for point in found["f16"]] == [1, 2]
    assert all(min(point.read_bytes_per_s, point.macs_per_s) > 0 for points in found.values() for point in points)


def test_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def answer(types: list[str], _: int) -> AttentionRates:
        asked.append(types)
        return AttentionRates({name: (AttentionPoint(1, 1e9, 2e9),) for name in types})

    monkeypatch.setattr(profile_attention, "measure_apart", answer)
    path, policy = tmp_path / "profile.json", KVPolicy(KVType.Q8_0, KVType.F16)
    profile = with_attention_rates(profile_here(), policy, path)
    assert stored(path) == profile
    assert with_attention_rates(profile, policy, path) is profile
    with_attention_rates(profile, KVPolicy(KVType.Q8_0, KVType.Q4_0), path)  # edges have 8 bits
    assert asked == [["f16", "q8_0"], ["q4_0"]]


def test_what_cannot_be_measured_is_derived(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert measure_apart(["nothing"], 1) == AttentionRates()
    assert "could not be measured" in caplog.text
    profile = profile_here()
    assert with_attention_rates(profile, KVPolicy(), tmp_path / "profile.json") is profile
