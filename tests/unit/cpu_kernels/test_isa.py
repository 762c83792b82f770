"""The choice of an instruction set."""

import pytest

from cpu_kernels import isa as ladder


def test_the_best_rung_is_taken_and_any_below_can_be_forced() -> None:
    rungs = ladder.runnable_isas()
    assert rungs[-1].name == "generic"
    assert ladder.choose(None) == rungs[0]
    for rung in rungs:
        assert ladder.choose(rung.name) == rung


@pytest.mark.parametrize("name", ["sse9", "AVX2", "neon512"])
def test_an_unknown_rung_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="STRATA_ISA") as caught:
        ladder.choose(name)
    assert "generic" in str(caught.value)


def test_a_rung_this_machine_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "host_features", lambda: frozenset({"sse2"}))
    assert [rung.name for rung in ladder.runnable_isas()] == ["generic"]
    with pytest.raises(ValueError, match="can be one of generic"):
        ladder.choose("avx2")


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        for value, expected in (("generic", "generic"), ("", ladder.runnable_isas()[0].name)):
            monkeypatch.setenv("STRATA_ISA", value)
            ladder.current.cache_clear()
            assert ladder.current().name == expected
        monkeypatch.setenv("STRATA_ISA", "fastest")
        ladder.current.cache_clear()
        with pytest.raises(ValueError, match="'fastest'"):
            ladder.current()
    finally:
        monkeypatch.undo()
        ladder.current.cache_clear()


def test_cross_compiled_neon_never_runs() -> None:
    assert not ladder.runnable(ladder.NEON_CROSS)
    assert ladder.NEON_CROSS.is_arm


@pytest.mark.parametrize(
    ("features", "best"),
    [
        ({"avx2", "fma", "f16c", "bmi", "bmi2"}, "avx2"),
        ({"avx2", "fma", "f16c", "bmi", "bmi2", "avxvnni"}, "avxvnni"),
        ({"avx2", "fma", "f16c", "bmi", "bmi2", "avx512f", "avx512bw", "avx512dq", "avx512vl"}, "avx2"),
        ({"neon", "dotprod"}, "neon"),
        ({"avx"}, "generic"),
    ],
)
def test_rungs_by_features(monkeypatch: pytest.MonkeyPatch, features: set[str], best: str) -> None:
    monkeypatch.setattr(ladder, "host_features", lambda: frozenset(features))
    assert ladder.runnable_isas()[0].name == best
