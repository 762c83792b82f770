"""Every table kernel against float64, on every ISA that this machine executes, and the noise of rounded tables.

Whole numbers as activations, whose greatest sum of four magnitudes is 127 in every block of 64, have exact tables: with
them a kernel must give the exact product.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cpu_kernels import isa as ladder
from cpu_kernels.dot import Tile
from cpu_kernels.isa import ISA, current, runnable_isas
from cpu_kernels.lut import LAYOUTS, TernaryPlanes
from cpu_kernels.panel_rows import PanelRows
from cpu_kernels.quant_types import quant_type
from cpu_kernels.reference.dequantize import dequantize
from cpu_kernels.tuning import Family
from tests.support.kernel_products import TOLERANCE, Case

TYPES = sorted(LAYOUTS)
every_isa = pytest.mark.parametrize("isa", runnable_isas(), ids=lambda isa: isa.name)


def _case(name: str, isa: ISA, rows: int, columns: int, rng: np.random.Generator, scale: float = 1.0) -> Case:
    return Case.random(name, isa, rows, columns, rng, scale, Family.TABLES)


def _exact_activations(n: int, columns: int, rng: np.random.Generator, scale: float = 1.0) -> NDArray[np.float32]:
    """(n, columns) whose tables are exact, times a power of two."""
    x = rng.integers(-31, 32, (n, columns)).astype(np.float32)
    x[:, ::64], x[:, 1::64], x[:, 2::64], x[:, 3::64] = 31, -32, 32, 32
    return x * np.float32(scale)


@every_isa
@pytest.mark.parametrize("name", TYPES)
def test_products_by_exact_tables_are_exact(name: str, isa: ISA) -> None:
    """Rows that do not fill a group, a single quant block, tiles of every width, several chunks of K."""
    rng = np.random.default_rng(1)
    block = quant_type(name).block_size
    for rows, columns, n in ((32, 2 * block, 1), (2 * isa.lanes + 5, 5 * block, 3), (3, block, 13), (9, 2560, 10)):
        case = _case(name, isa, rows, columns, rng)
        x = _exact_activations(n, columns, rng)
        assert case.error(x, case.multiply(x)) < TOLERANCE


@pytest.mark.parametrize("name", ["Q1_0", "Q4_0", "Q3_K"])
@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 70),
    blocks=st.integers(1, 9),
    n=st.integers(1, 14),
    scale=st.sampled_from([1e-3, 1.0, 300.0]),
    spread=st.sampled_from([0.0, 2.0**-40, 1.0, 2.0**13]),
    seed=st.integers(0, 1000),
)
def test_products_of_any_shape_and_scale(
    name: str, rows: int, blocks: int, n: int, scale: float, spread: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    columns = blocks * quant_type(name).block_size
    case = _case(name, current(), rows, columns, rng, scale)
    x = _exact_activations(n, columns, rng, spread)
    assert case.error(x, case.multiply(x)) < TOLERANCE


@pytest.mark.parametrize("name", TYPES)
def test_noise_of_rounded_tables(name: str) -> None:
    """Error variance over the product's: 1e-5 to 4.5e-5 of Gaussian activations, twice as much with outliers.

    Int8 activations with a scale for 32 have 3e-5; sums that are rounded again when added would have ten times more.
    """
    rng = np.random.default_rng(2)
    case = _case(name, current(), 256, 2560, rng)
    x = rng.standard_normal((16, 2560)).astype(np.float32)
    assert 5e-6 < _noise(case, x) < 4.5e-5
    x[rng.random(x.shape) < 0.005] *= 10
    assert _noise(case, x) < 9e-5


def _noise(case: Case, x: NDArray[np.float32]) -> float:
    weights = dequantize(case.data.reshape(case.rows, -1), case.form.quant_type).astype(np.float64)
    exact = x.astype(np.float64) @ weights.T
    return float(((case.multiply(x) - exact) ** 2).sum() / (exact**2).sum())


@every_isa
@pytest.mark.parametrize("name", TYPES)
def test_columns_do_not_depend_on_their_neighbours(name: str, isa: ISA) -> None:
    rng = np.random.default_rng(3)
    case = _case(name, isa, 39, 768, rng)
    x = rng.standard_normal((11, 768)).astype(np.float32)
    alone = np.concatenate([case.multiply(x[index : index + 1]) for index in range(len(x))])
    for n in (2, 3, 4, 7, 11):
        assert np.array_equal(case.multiply(x[:n]), alone[:n])
    assert np.array_equal(case.multiply(x, slices=2), alone)


def test_narrow_lookups_on_wide_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """AVX512 without VBMI: rows are bytes of 64-byte vectors."""
    isa = current()
    if not isa.has_wide_lookup:
        pytest.skip("needs AVX512 VBMI to leave it away")
    features = ladder.host_features() - {"avx512vbmi"}
    monkeypatch.setattr(ladder, "host_features", lambda: features)
    rng = np.random.default_rng(4)
    for name in ("Q1_0", "Q2_K"):
        case = _case(name, isa, 70, 1024, rng)
        assert case.form.group_rows == 64
        x = _exact_activations(5, 1024, rng)
        assert case.error(x, case.multiply(x)) < TOLERANCE


def test_activations_that_are_not_numbers_show() -> None:
    rng = np.random.default_rng(5)
    case = _case("Q1_0", current(), 5, 256, rng)
    x = rng.standard_normal((3, 256)).astype(np.float32)
    x[0, 17], x[1, 99] = np.nan, -np.inf
    result = case.multiply(x)
    assert not np.isfinite(result[:2]).any()
    assert np.isfinite(result[2]).all()


@pytest.mark.parametrize("name", TYPES)
def test_rows_can_be_read_back(name: str) -> None:
    rng = np.random.default_rng(6)
    case = _case(name, current(), 37, 768, rng)
    weights = dequantize(case.data.reshape(37, -1), case.form.quant_type)
    rows = PanelRows(case.form, case.panels.ctypes.data, 37, 768).read([0, 36, 5])
    assert np.allclose(rows, weights[[0, 36, 5]], rtol=1e-6, atol=1e-6)


class _SwappedPlanes(TernaryPlanes):
    factors = (1, 2)


class _WrongOffset(TernaryPlanes):
    offset = 1.01


class _SlightlyTooMuch(TernaryPlanes):
    def dot(self, tile: Tile) -> None:
        super().dot(tile)
        tile.sums[0].set(tile.sums[0].get() * 1.0001)


@pytest.mark.parametrize("layout", [_SwappedPlanes, _WrongOffset, _SlightlyTooMuch])
def test_a_wrong_kernel_is_found(layout: type[TernaryPlanes]) -> None:
    rng = np.random.default_rng(7)
    kind = replace(quant_type("TQ2_0"), name=f"TQ2_0_{layout.__name__}")  # a kernel of another name
    right = _case("TQ2_0", current(), 16, 512, rng)
    wrong = replace(right, form=replace(right.form, quant_type=kind, layout=layout(kind)))
    x = _exact_activations(1, 512, rng)
    assert right.error(x, wrong.multiply(x)) > 20 * TOLERANCE
