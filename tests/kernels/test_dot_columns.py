"""A column's product is the same, bit for bit, beside any other columns and however the row groups are handed out."""

import numpy as np
import pytest

from cpu_kernels.isa import ISA, current, runnable_isas
from tests.support.kernel_products import TYPES, Case


@pytest.mark.parametrize("name", TYPES)
def test_columns_do_not_depend_on_their_neighbours(name: str) -> None:
    _check(name, current(), 2560)


@pytest.mark.parametrize("isa", runnable_isas()[1:], ids=lambda isa: isa.name)
@pytest.mark.parametrize("name", ["F16", "Q8_0", "Q5_K", "Q6_K", "IQ4_XS"])
def test_columns_do_not_depend_on_their_neighbours_on_lower_isas(name: str, isa: ISA) -> None:
    _check(name, isa, 512)


def _check(name: str, isa: ISA, columns: int) -> None:
    rng = np.random.default_rng(6)
    case = Case.random(name, isa, 2 * isa.lanes + 3, columns, rng)
    x = rng.standard_normal((21, columns)).astype(np.float32)
    alone = np.concatenate([case.multiply(x[index : index + 1]) for index in range(len(x))])
    for n in (2, 3, 5, 8, 12, 16, 21):
        assert np.array_equal(case.multiply(x[:n]), alone[:n])
    assert np.array_equal(case.multiply(x, slices=3), alone)


def test_batches_of_columns_do_not_change_a_column() -> None:
    """300 columns go through a kernel in several batches."""
    rng = np.random.default_rng(7)
    case = Case.random("Q4_0", current(), 20, 64, rng)
    x = rng.standard_normal((300, 64)).astype(np.float32)
    result = case.multiply(x)
    for index in (0, 7, 127, 128, 200, 299):
        assert np.array_equal(result[index : index + 1], case.multiply(x[index : index + 1]))


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "IQ4_NL"])
def test_isas_with_fused_sums_agree_to_the_bit(name: str) -> None:
    """Integer dots are exact everywhere, and lanes are rows: only the width differs."""
    fused = [isa for isa in runnable_isas() if isa.has_fma]
    results = []
    for isa in fused:
        rng = np.random.default_rng(8)
        case = Case.random(name, isa, 33, 512, rng)
        results.append(case.multiply(rng.standard_normal((3, 512)).astype(np.float32)))
    assert all(np.array_equal(result, results[0]) for result in results)
