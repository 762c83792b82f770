"""Choices of kernels: the rule, the measurement's bounds, JSON."""

import json
import time

import pytest

from cpu_kernels.formats import Family, panel_format
from cpu_kernels.isa import BY_NAME, current
from cpu_kernels.quant_types import quant_type
from cpu_kernels.tune import TUNED_COLUMNS, Choice, Tuning, default_tuning, fastest, tune


def test_the_default_stays_unless_another_wins_alone_and_overall() -> None:
    default = (1.0, 1.0, 1.0, 1.0)
    assert fastest([default]) == 0
    assert fastest([default, (0.99, 0.97, 0.97, 0.97)]) == 0  # 3% are noise
    assert fastest([default, (1.1, 0.5, 0.5, 0.5)]) == 0  # slower at one column
    assert fastest([default, (1.01, 0.8, 0.8, 0.8)]) == 1
    assert fastest([default, (1.0, 0.8, 0.8, 0.8), (0.9, 0.7, 0.7, 0.7)]) == 2


def test_without_measurements_everything_is_a_dot_product() -> None:
    kind = quant_type("Q1_0")
    form, plain = default_tuning().panel_format(kind, current()), panel_format(kind, current())
    assert (form.name, form.family, form.isa) == (plain.name, Family.DOT, plain.isa)
    with pytest.raises(NotImplementedError, match="no kernel for I8"):
        default_tuning().panel_format(quant_type("I8"), current())


def test_choices_are_followed() -> None:
    tuning = Tuning(current().name, {"Q1_0": Choice(Family.TABLES, 2), "Q4_0": Choice(Family.DOT, 4)})
    form = tuning.panel_format(quant_type("Q1_0"), current())
    assert (form.family, form.isa.tile_columns, form.name) == (Family.TABLES, 2, "q1_0_tables")
    assert tuning.panel_format(quant_type("Q4_0"), current()).isa.tile_columns == 4
    other = next(isa for isa in BY_NAME.values() if isa.name != current().name)
    with pytest.raises(ValueError, match=f"tuned for {current().name}, not for {other.name}"):
        tuning.panel_format(quant_type("Q1_0"), other)
    with pytest.raises(ValueError, match="a tile of 3 columns"):
        form.with_tile(3)


def test_tuning_goes_through_json() -> None:
    choices = {"Q1_0": Choice(Family.TABLES, 4, (1e-4,) * len(TUNED_COLUMNS)), "Q4_0": Choice(Family.DOT, 8)}
    tuning = Tuning("avx2", choices)
    assert Tuning.from_json(json.loads(json.dumps(tuning.to_json()))) == tuning


@pytest.mark.parametrize(
    "data",
    [
        None,
        {},
        {"isa": "avx2", "columns": [1], "choices": {}},
        {"isa": "avx2", "columns": list(TUNED_COLUMNS), "choices": {"Q4_0": {"family": "dot"}}},
        {
            "isa": "avx2",
            "columns": list(TUNED_COLUMNS),
            "choices": {"Q4_0": {"family": "dot", "tile_columns": 8, "seconds": ["x"]}},
        },
        {
            "isa": "avx2",
            "columns": list(TUNED_COLUMNS),
            "choices": {"Q4_0": {"family": "magic", "tile_columns": 8, "seconds": []}},
        },
    ],
)
def test_other_json_is_refused(data: object) -> None:
    with pytest.raises(ValueError, match=r"tun|choice|Family"):
        Tuning.from_json(data)


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
