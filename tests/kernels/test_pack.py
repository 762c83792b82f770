"""Packing: sizes, errors, threads, pieces, speed."""

import time

import numpy as np
import pytest

from cpu_kernels.formats import has_panel_format, panel_format
from cpu_kernels.isa import current
from cpu_kernels.lut import LAYOUTS
from cpu_kernels.memory import aligned_bytes
from cpu_kernels.pack import pack
from cpu_kernels.quant_types import quant_type
from cpu_kernels.tuning import Family
from tests.support.kernel_products import TYPES, random_blocks

_LARGER_PANELS = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"), 106),
    **dict.fromkeys(("IQ3_XXS", "IQ3_S"), 138),
}


@pytest.mark.parametrize("name", TYPES)
def test_panels_take_as_much_as_gguf(name: str) -> None:
    """Except for the types that are re-coded, whose bytes a block are listed."""
    kind = quant_type(name)
    form = panel_format(kind, current())
    block_bytes = _LARGER_PANELS.get(name, kind.block_bytes)
    columns = 2560
    expected = form.group_rows * 3 * columns // kind.block_size * block_bytes
    assert form.panel_bytes(3 * form.group_rows, columns) == -(-expected // 64) * 64


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_panels_for_tables_take_as_much_as_gguf(name: str) -> None:
    """Except for ternary digits, which become two planes."""
    kind = quant_type(name)
    form = panel_format(kind, current(), Family.TABLES)
    block_bytes = 66 if name == "TQ1_0" else kind.block_bytes
    assert form.group_bytes(2560) == form.group_rows * 2560 // kind.block_size * block_bytes


def test_threads_and_pieces_pack_alike() -> None:
    kind, isa = quant_type("Q6_K"), current()
    rng = np.random.default_rng(1)
    rows, columns = 5 * isa.lanes + 3, 512
    data = random_blocks(kind, rows, columns, rng)
    whole = pack(data, kind, rows, columns, isa)
    assert np.array_equal(pack(data, kind, rows, columns, isa, threads=3), whole)
    first = 2 * isa.lanes
    out = aligned_bytes(whole.size)
    size = panel_format(kind, isa).group_bytes(columns) * 2
    out[:size] = pack(data[: first * kind.row_bytes(columns)], kind, first, columns, isa)[:size]
    rest = pack(data[first * kind.row_bytes(columns) :], kind, rows - first, columns, isa)
    out[size:] = rest[: whole.size - size]
    assert np.array_equal(out, whole)


def test_packing_into_given_memory() -> None:
    kind, isa = quant_type("Q4_0"), current()
    data = random_blocks(kind, 20, 64, np.random.default_rng(2))
    whole = pack(data, kind, 20, 64, isa)
    out = aligned_bytes(whole.size + 64)
    assert pack(data, kind, 20, 64, isa, out=out) is out
    assert np.array_equal(out[: whole.size], whole)
    with pytest.raises(ValueError, match="multiple of 64"):
        pack(data, kind, 20, 64, isa, out=out[1:])
    with pytest.raises(ValueError, match="panel bytes where"):
        pack(data, kind, 20, 64, isa, out=aligned_bytes(64))


def test_wrong_input_is_refused() -> None:
    kind, isa = quant_type("Q4_K"), current()
    data = random_blocks(kind, 4, 512, np.random.default_rng(3))
    with pytest.raises(ValueError, match="GGUF bytes where"):
        pack(data[:-1], kind, 4, 512, isa)
    with pytest.raises(ValueError, match="not a multiple of the 256"):
        pack(data, kind, 4, 500, isa)
    with pytest.raises(ValueError, match="a matrix of 0"):
        pack(data, kind, 0, 512, isa)
    with pytest.raises(TypeError, match="uint8"):
        pack(data.view(np.int8), kind, 4, 512, isa)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="contiguous"):
        pack(data[::2], kind, 4, 512, isa)
    with pytest.raises(NotImplementedError, match="no kernel for I8"):
        pack(data, quant_type("I8"), 4, 512, isa)
    with pytest.raises(NotImplementedError, match="no kernel for Q4_K weights by tables"):
        pack(data, kind, 4, 512, isa, family=Family.TABLES)
    assert not has_panel_format(quant_type("Q8_K"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_K", "Q6_K", "IQ2_XXS"])
def test_packing_runs_at_memory_speed(name: str) -> None:
    """Far below the 1.4 to 13 GB/s measured on an idle core, far above what numpy reaches."""
    kind, isa = quant_type(name), current()
    rows, columns = 1024, 4096
    data = random_blocks(kind, rows, columns, np.random.default_rng(4))
    out = pack(data, kind, rows, columns, isa)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        pack(data, kind, rows, columns, isa, out=out)
        best = min(best, time.perf_counter() - start)
    assert data.nbytes / best > 0.4e9
