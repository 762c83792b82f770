"""Kernels become the instructions that make them fast; NEON ones, which only compile here, are looked at as text."""

import re

import pytest

from cpu_kernels.compiler import assembly, kernel_address
from cpu_kernels.dot_frame import trace_matmul
from cpu_kernels.formats import panel_format
from cpu_kernels.isa import BY_NAME, ISA, NEON_CROSS, runnable
from cpu_kernels.quant_types import quant_type
from cpu_kernels.tuning import Family


def _assembly(name: str, isa: ISA, family: Family = Family.DOT) -> str:
    form = panel_format(quant_type(name), isa, family)
    return assembly(f"matmul_{form.name}", form.isa, lambda kernel: trace_matmul(kernel, form.layout), thorough=False)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Q8_0", (r"\bsdot\b", r"\bprfm\b", r"\bfcvtl\b")),
        ("Q4_0", (r"\bsdot\b", r"\bushr\b")),
        ("Q6_K", (r"\bsdot\b",)),
        ("IQ4_NL", (r"\bsdot\b", r"\btbl\b")),
        ("MXFP4", (r"\bsdot\b", r"\btbl\b")),
        ("F16", (r"\bfcvtl\b", r"\bfmla\b")),
    ],
)
def test_neon_instructions(name: str, expected: tuple[str, ...]) -> None:
    text = _assembly(name, NEON_CROSS)
    for instruction in expected:
        assert re.search(instruction, text), f"{instruction} is missing"


@pytest.mark.parametrize("name", ["Q1_0", "TQ2_0", "Q4_0", "Q3_K"])
def test_neon_table_lookups(name: str) -> None:
    text = _assembly(name, NEON_CROSS, Family.TABLES)
    assert re.search(r"\btbl\b", text)
    assert not re.search(r"\bsdot\b", text)


def test_x86_table_lookups() -> None:
    for isa, expected in (("avx512vnni", r"vpermb.*%zmm|vpshufb.*%zmm"), ("avx2", r"vpshufb.*%ymm")):
        if runnable(BY_NAME[isa]):
            assert re.search(expected, _assembly("Q1_0", BY_NAME[isa], Family.TABLES))


@pytest.mark.parametrize(
    ("isa", "expected", "absent"),
    [
        ("avx512vnni", r"vpdpbusd.*%zmm", r"vpmaddubsw"),
        ("avxvnni", r"vpdpbusd.*%ymm", r"%zmm"),
        ("avx2", r"vpmaddubsw.*%ymm", r"%zmm|vpdpbusd"),
        ("generic", r"pmaddwd|pmulld|pmuludq", r"%ymm|%zmm"),
    ],
)
def test_x86_instructions(isa: str, expected: str, absent: str) -> None:
    rung = BY_NAME[isa]
    if not runnable(rung) or rung.is_arm:
        pytest.skip(f"this machine does not execute {isa}")
    text = _assembly("Q4_0", rung)
    assert re.search(expected, text)
    assert not re.search(absent, text)


def test_cross_compiled_code_is_not_for_running() -> None:
    with pytest.raises(ValueError, match="does not run here"):
        kernel_address("nothing", NEON_CROSS, lambda kernel: None)
