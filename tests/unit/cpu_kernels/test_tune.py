"""Choices of kernels: the rule, what follows from them, the measurement's bounds."""

import time

import pytest

from cpu_kernels.formats import Family, can_follow, chosen_format, panel_format
from cpu_kernels.isa import BY_NAME, current
from cpu_kernels.quant_types import quant_type
from cpu_kernels.tune import TUNED_COLUMNS, fastest, tune
from cpu_kernels.tuning import Choice, Tuning


def test_the_default_stays_unless_another_wins_alone_and_overall() -> None:
    default = (1.0, 1.0, 1.0, 1.0)
    better = (1.0, 0.8, 0.8, 0.8)
    assert fastest([default], [False]) == 0
    assert fastest([default, (0.99, 0.97, 0.97, 0.97)], [False, False]) == 0  # 3% are noise
    assert fastest([default, (1.1, 0.5, 0.5, 0.5)], [False, False]) == 0  # slower at one column
    assert fastest([default, (1.01, 0.8, 0.8, 0.8)], [False, False]) == 1
    assert fastest([default, better, (0.9, 0.7, 0.7, 0.7)], [False, False, False]) == 2
    assert fastest([default, better, (0.95, 0.7, 0.7, 0.7)], [False, False, True]) == 1  # not worth coarser rounding
    assert fastest([default, better, (0.9, 0.7, 0.7, 0.7)], [False, False, True]) == 2


@pytest.mark.parametrize(
    "tuning", [None, Tuning(current().name), Tuning(current().name, {"Q4_0": Choice(Family.DOT, 4)})]
)
def test_a_type_without_a_choice_is_a_dot_product(tuning: Tuning | None) -> None:
    kind = quant_type("Q1_0")
    form, plain = chosen_format(kind, current(), tuning), panel_format(kind, current())
    assert (form.name, form.family, form.isa) == (plain.name, Family.DOT, plain.isa)
    with pytest.raises(NotImplementedError, match="no kernel for I8"):
        chosen_format(quant_type("I8"), current(), tuning)


def test_choices_are_followed() -> None:
    tuning = Tuning(current().name, {"Q1_0": Choice(Family.TABLES, 2), "Q4_0": Choice(Family.DOT, 4)})
    form = chosen_format(quant_type("Q1_0"), current(), tuning)
    assert (form.family, form.isa.tile_columns, form.name) == (Family.TABLES, 2, "q1_0_tables")
    assert chosen_format(quant_type("Q4_0"), current(), tuning).isa.tile_columns == 4
    other = next(isa for isa in BY_NAME.values() if isa.name != current().name)
    with pytest.raises(ValueError, match=f"tuned for {current().name}, not for {other.name}"):
        chosen_format(quant_type("Q1_0"), other, tuning)


def test_only_choices_for_these_kernels_can_be_followed() -> None:
    choice = Choice(Family.TABLES, 2)
    assert can_follow(Tuning(current().name, {"Q1_0": choice}), current())
    assert not can_follow(Tuning("other", {"Q1_0": choice}), current())
    assert not can_follow(Tuning(current().name, {"Q8_0": choice}), current())  # no tables for 8 bits


def test_a_tile_that_no_kernel_has() -> None:
    with pytest.raises(ValueError, match="a tile of 3 columns"):
        Choice(Family.DOT, 3)


def test_newer_choices_replace_older_ones_of_the_same_kernels() -> None:
    old = Tuning("avx2", {"Q4_0": Choice(Family.DOT, 4, (1.0,)), "Q8_0": Choice(Family.DOT, 4)})
    new = Tuning("avx2", {"Q4_0": Choice(Family.DOT, 8, (0.5,))})
    assert old.updated(None) is old
    assert old.updated(new).choices == {"Q8_0": old.choices["Q8_0"], "Q4_0": new.choices["Q4_0"]}
    assert old.updated(Tuning("neon", new.choices)) == Tuning("neon", new.choices)
    assert old.of(["Q4_0", "F32"]) == Tuning("avx2", {"Q4_0": Choice(Family.DOT, 4)})


def test_tuning_measures_every_type_once() -> None:
    kinds = [quant_type(name) for name in ("Q1_0", "Q4_0", "Q8_K")]
    tune(kinds, seconds_budget=0.0)  # compiles
    start = time.perf_counter()
    tuning = tune(kinds, seconds_budget=0.2)
    assert time.perf_counter() - start < 6  # 0.7 s on an idle machine
    assert set(tuning.choices) == {"Q1_0", "Q4_0"}  # there are no kernels for Q8_K
    for choice in tuning.choices.values():
        assert len(choice.seconds) == len(TUNED_COLUMNS)
        assert min(choice.seconds) > 0
    assert tune([], seconds_budget=0.1).choices == {}
