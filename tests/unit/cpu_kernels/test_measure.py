"""Figures of kernels hang together; what they are is this machine's business."""

import pytest

from cpu_kernels.activations import ActivationKind
from cpu_kernels.isa import ISA, current, runnable_isas
from cpu_kernels.measure import COLUMNS, ROWS, Bench, kernel_table
from cpu_kernels.quant_types import quant_type
from cpu_kernels.tuning import Family


def test_a_table_has_every_family_and_number_of_columns() -> None:
    kinds = [quant_type("Q2_0"), quant_type("F16")]
    figures = kernel_table(kinds, (1, 8), threads=2, seconds_budget=0.1)
    assert [(figure.quant_type, figure.family, figure.columns) for figure in figures] == [
        ("Q2_0", Family.DOT, 1),
        ("Q2_0", Family.DOT, 8),
        ("Q2_0", Family.TABLES, 1),
        ("Q2_0", Family.TABLES, 8),
        ("F16", Family.DOT, 1),
        ("F16", Family.DOT, 8),
    ]
    for figure in figures:
        assert (figure.isa, figure.threads) == (current().name, 2)
        assert figure.gmac_per_s == pytest.approx(ROWS * COLUMNS * figure.columns / figure.seconds / 1e9)
        bits = 16 if figure.quant_type == "F16" else 2.25
        assert figure.gb_per_s == pytest.approx(ROWS * COLUMNS * bits / 8 / figure.seconds / 1e9, rel=1e-3)
        assert min(figure.read_gb_per_s, figure.share_of_read, figure.share_of_peak, figure.quantize_seconds) > 0


def test_nothing_to_measure() -> None:
    assert kernel_table([quant_type("Q8_K")], (1,), threads=1, seconds_budget=0.1) == []
    assert kernel_table([quant_type("Q4_0")], (), threads=1, seconds_budget=0.1) == []


@pytest.mark.parametrize("isa", runnable_isas(), ids=lambda isa: isa.name)
def test_peaks_are_within_reason(isa: ISA) -> None:
    """Multiplications a second: one a microsecond would be a broken loop, a million a nanosecond an empty one."""
    with Bench(1, working_set_bytes=1 << 20) as bench:
        for kind in (ActivationKind.INT8, ActivationKind.FLOAT32):
            assert 1e8 < bench.peak(isa, kind) < 1e14
