"""Rows read back from panels, and sums that find what is not finite."""

from dataclasses import replace

import numpy as np
import pytest

from cpu_kernels.isa import ISA, current
from cpu_kernels.pack import pack
from cpu_kernels.panel_rows import PanelRows, PanelSums
from cpu_kernels.reference.dequantize import dequantizable, dequantize
from tests.support.kernel_products import TYPES, Case
from tests.support.rows import ISAS, address

CASES = [*((current(), name) for name in TYPES), *((isa, name) for isa in ISAS[1:] for name in ("F16", "Q8_0", "Q6_K"))]
# where a float16 that scales a block lies
SCALES = {"F16": 0, "Q8_0": 0, "Q4_0": 0, "Q4_K": 2, "Q6_K": 208, "IQ4_XS": 0, "IQ2_XXS": 0, "TQ1_0": 52, "TQ2_0": 64}


@pytest.mark.parametrize(("isa", "name"), CASES, ids=[f"{name}-{isa.name}" for isa, name in CASES])
def test_rows_are_what_the_reference_decodes(isa: ISA, name: str) -> None:
    case = Case.random(name, isa, 45, 512, np.random.default_rng(1))
    assert dequantizable(case.form.quant_type)
    expected = dequantize(case.data.reshape(45, -1), case.form.quant_type)
    reader = PanelRows(case.form, address(case.panels), 45, 512)
    order = [44, 0, 17, 17, 31, 32]
    np.testing.assert_allclose(reader.read(order), expected[order], rtol=4e-7, atol=2e-7 * np.abs(expected).max())
    assert np.abs(reader.read([44]) - expected[43]).max() > 0.01 * np.abs(expected).max()


@pytest.mark.parametrize("columns", [1, 31, 33, 100])
def test_float_rows_of_any_length(columns: int) -> None:
    case = Case.random("F32", current(), 5, columns, np.random.default_rng(1))
    expected = case.data.view(np.float32).reshape(5, columns)
    np.testing.assert_array_equal(PanelRows(case.form, address(case.panels), 5, columns).read(range(5)), expected)


def test_rows_that_are_not_there() -> None:
    case = Case.random("Q8_0", current(), 5, 64, np.random.default_rng(1))
    reader = PanelRows(case.form, address(case.panels), 5, 64)
    assert reader.read([]).shape == (0, 64)
    for row in (-1, 5):
        with pytest.raises(IndexError, match=f"row {row} of 5"):
            reader.read([row])


@pytest.mark.parametrize("name", TYPES)
def test_sums_of_rows(name: str) -> None:
    case = Case.random(name, current(), 20, 256, np.random.default_rng(2))
    sums = PanelSums(case.form, 256)
    expected = dequantize(case.data.reshape(20, -1), case.form.quant_type).astype(np.float64)
    found = sums.of(address(case.panels), 20)
    assert np.abs(found - expected.sum(1)).max() <= 1e-5 * np.abs(expected).sum(1).max()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", SCALES)
def test_sums_tell_rows_that_are_not_finite(name: str, value: float) -> None:
    case = Case.random(name, current(), 20, 512, np.random.default_rng(3))
    kind, place = case.form.quant_type, SCALES[name] + case.data.nbytes // 20 * 7
    data = case.data.copy()
    data[place : place + 2] = np.array([value], np.float16).view(np.uint8)
    damaged = replace(case, data=data, panels=pack(data, kind, 20, 512, current()))
    sums = PanelSums(case.form, 512).of(address(damaged.panels), 20)
    assert np.flatnonzero(~np.isfinite(sums)).tolist() == [7]
