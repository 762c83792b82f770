"""Triton's kernels compile for every GPU from Pascal to Blackwell, to the instructions that make them worth having."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from gpu_kernels.decoding import DECODINGS

REPOSITORY = Path(__file__).resolve().parents[2]
KERNELS = {
    *("few_columns_kernel", "many_columns_kernel", "decode_kernel", "halve_kernel", "sum_splits_kernel"),
    *(
        "attention_kernel",
        "merge_splits_kernel",
        "join_parts_kernel",
        "heads_kernel",
        "route_kernel",
        "rms_norm_kernel",
    ),
    *("add_norm_kernel", "elementwise_kernel", "gather_kernel", "scatter_kernel"),
}


@cache
def compiled(capabilities: tuple[int, ...], types: tuple[str, ...], *options: str) -> list[dict[str, object]]:
    """What the script counts, in a process of its own: here kernels may be the interpreter's."""
    command = [sys.executable, "-m", "scripts.check_ptx", "--json", "--types", *types, *options, "--capability"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [*command, *map(str, capabilities)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def check(rows: list[dict[str, object]], capability: int) -> None:
    """Matrix units from Ampere on, float32 before; wide loads; no bfloat16 arithmetic before Ampere."""
    for row in rows:
        name, is_float32 = row["kernel"], str(row["label"]).startswith(("float32", "F32"))
        if name in {"many_columns_kernel", "attention_kernel"}:
            has_matrix_units = capability >= 80 and not is_float32
            assert row["mma" if has_matrix_units else "fma_f32"], row
            assert has_matrix_units or not row["mma"], row
        # where products are fused sums could depend on how many columns there are, and codes would not be the CPU's
        if name in {"few_columns_kernel", "heads_kernel"}:
            assert not row["fma_f32"], row
            assert not row["loose_f32"], row
        if name in {"few_columns_kernel", "attention_kernel", "rms_norm_kernel", "elementwise_kernel"}:
            assert row["wide_loads"], row
        assert capability >= 80 or not row["bf16"], row


@pytest.mark.parametrize("capability", [61, 90])
def test_every_kernel_compiles(capability: int) -> None:
    rows = compiled((capability,), ("Q4_0",))
    left_out = {"halve_kernel", "sum_splits_kernel"} if capability < 80 else set()
    assert {row["kernel"] for row in rows} == KERNELS - left_out
    check(rows, capability)


def test_every_type_compiles() -> None:
    rows = compiled((86,), tuple(DECODINGS), "--quick")
    assert {str(row["label"]).partition(",")[0] for row in rows if row["kernel"] == "few_columns_kernel"} == set(
        DECODINGS
    )
    check(rows, 86)


@pytest.mark.parametrize("capability", [75, 80, 89, 120])
def test_products_and_attention_compile(capability: int) -> None:
    check(compiled((capability,), ("Q4_K",), "--quick"), capability)


def test_sums_of_a_step_are_made_alike_for_any_number_of_columns() -> None:
    rows = compiled((86,), ("Q4_0", "Q4_K", "Q3_K", "MXFP4", "F16"), "--steps")
    found: dict[tuple[str, str], set[str]] = {}
    codes: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        key = str(row["kernel"]), str(row["label"]).partition(",")[0]
        found.setdefault(key, set()).add(str(row["sums"]))
        codes.setdefault(key, set()).add(str(row["code"]))
    assert {kernel for kernel, _ in found} >= {"few_columns_kernel", "many_columns_kernel", "attention_kernel"}
    assert all(len(sums) == 1 for sums in found.values()), found
    # kernels that fuse are the very same code
    assert all(len(each) == 1 for (kernel, _), each in codes.items() if kernel != "few_columns_kernel"), codes
