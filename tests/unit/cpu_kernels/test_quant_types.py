"""The table of storage formats."""

import pytest

from cpu_kernels.quant_types import QUANT_TYPES, quant_type, unknown_quant_type


def test_names_and_ids_are_unique() -> None:
    assert all(kind.ggml_id == ggml_id for ggml_id, kind in QUANT_TYPES.items())
    assert all(quant_type(kind.name) is kind for kind in QUANT_TYPES.values())
    with pytest.raises(KeyError):
        quant_type("Q9_X")


def test_sizes() -> None:
    q4_k = quant_type("Q4_K")
    assert q4_k.is_known
    assert q4_k.bits_per_weight == 4.5
    assert q4_k.row_bytes(512) == 288
    with pytest.raises(ValueError, match="500 columns are not a multiple of the 256 weights of a Q4_K block"):
        q4_k.row_bytes(500)


def test_an_unknown_type() -> None:
    unknown = unknown_quant_type(77)
    assert (unknown.name, unknown.ggml_id, unknown.is_known, unknown.bits_per_weight) == ("type 77", 77, False, 0.0)
    with pytest.raises(ValueError, match="type 77 has no known block layout"):
        unknown.row_bytes(32)
