"""Every matmul kernel against float64, on every ISA that this machine executes."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_kernels.dot import Part, Tile
from cpu_kernels.dot_4bit import OffsetNibbles, nibble_codes
from cpu_kernels.isa import ISA, current, runnable_isas
from cpu_kernels.quant_types import quant_type
from tests.support.kernel_products import TOLERANCE, TYPES, Case

pytestmark = pytest.mark.filterwarnings("error")
every_isa = pytest.mark.parametrize("isa", runnable_isas(), ids=lambda isa: isa.name)


@every_isa
@pytest.mark.parametrize("name", TYPES)
def test_products_equal_float64_on_dequantised_weights(name: str, isa: ISA) -> None:
    """Rows that do not fill a group, a single quant block, tiles of every width, several chunks of K."""
    rng = np.random.default_rng(1)
    block = quant_type(name).block_size
    for rows, columns, n in (
        (isa.lanes, 2 * block, 1),
        (2 * isa.lanes + 5, 5 * block, 3),
        (3, block, 13),
        (9, 2560, 2),
    ):
        case = Case.random(name, isa, rows, columns, rng)
        x = rng.standard_normal((n, columns)).astype(np.float32)
        assert case.error(x, case.multiply(x)) < TOLERANCE


@every_isa
@pytest.mark.parametrize("name", TYPES)
def test_extreme_activations_do_not_saturate(name: str, isa: ISA) -> None:
    rng = np.random.default_rng(2)
    columns = max(512, quant_type(name).block_size)
    case = Case.random(name, isa, isa.lanes, columns, rng)
    x = np.full((2, columns), 127, dtype=np.float32)
    x[1, ::3] = -127
    assert case.error(x, case.multiply(x)) < TOLERANCE


@pytest.mark.parametrize("name", ["F16", "Q8_0", "Q4_K", "Q6_K", "IQ2_XS"])
@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 70),
    blocks=st.integers(1, 9),
    n=st.integers(1, 20),
    scale=st.sampled_from([1e-3, 1.0, 300.0]),
    spread=st.sampled_from([0.0, 1e-12, 1.0, 1e4]),
    seed=st.integers(0, 1000),
)
def test_products_of_any_shape_and_scale(
    name: str, rows: int, blocks: int, n: int, scale: float, spread: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    columns = blocks * quant_type(name).block_size
    case = Case.random(name, current(), rows, columns, rng, scale)
    x = (rng.standard_normal((n, columns)) * spread).astype(np.float32)
    x[:, :: max(1, columns // 3)] *= 20
    assert case.error(x, case.multiply(x)) < TOLERANCE


def test_adding_to_what_is_there() -> None:
    rng = np.random.default_rng(3)
    for rows in (32, 37):
        case = Case.random("Q4_0", current(), rows, 64, rng)
        x = rng.standard_normal((3, 64)).astype(np.float32)
        before = rng.standard_normal((3, rows)).astype(np.float32)
        assert np.array_equal(case.multiply(x, out=before), before + case.multiply(x))


def test_activations_that_are_not_numbers_show() -> None:
    rng = np.random.default_rng(4)
    for name in ("Q4_0", "F16"):
        case = Case.random(name, current(), 5, 256, rng)
        x = rng.standard_normal((3, 256)).astype(np.float32)
        x[0, 17], x[1, 99] = np.nan, np.inf
        result = case.multiply(x)
        assert not np.isfinite(result[:2]).any()
        assert np.isfinite(result[2]).all()


class _WrongOffset(OffsetNibbles):
    def dot(self, tile: Tile) -> None:
        size = tile.vector_bytes
        tile.block([Part(nibble_codes(tile, 0), tile.load_half(4 * size), offset=8.01)])
        tile.advance(4 * size + size // 2)


class _SwappedVectors(OffsetNibbles):
    def dot(self, tile: Tile) -> None:
        size = tile.vector_bytes
        codes = list(nibble_codes(tile, 0))
        codes[0], codes[1] = codes[1], codes[0]
        tile.block([Part(codes, tile.load_half(4 * size), offset=8.0)])
        tile.advance(4 * size + size // 2)


@pytest.mark.parametrize("layout", [_WrongOffset, _SwappedVectors])
def test_a_wrong_kernel_is_found(layout: type[OffsetNibbles]) -> None:
    rng = np.random.default_rng(5)
    kind = replace(quant_type("Q4_0"), name=f"Q4_0_{layout.__name__}")  # a kernel of another name
    right = Case.random("Q4_0", current(), 16, 256, rng)
    wrong = replace(right, form=replace(right.form, quant_type=kind, layout=layout(kind)))
    x = rng.standard_normal((2, 256)).astype(np.float32)
    assert right.error(x, wrong.multiply(x)) > 100 * TOLERANCE
