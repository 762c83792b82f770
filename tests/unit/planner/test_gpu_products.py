"""What was measured of a GPU's products is kept for that GPU and the software there is."""

from pathlib import Path

import pytest

from gpu_kernels.dispatch import weightiest
from gpu_kernels.product_shape import ProductShape
from offload.gguf import GGUFFile
from planner import gpu_products
from tests.support import models

WAYS = {"Q4_0 64x32 32": "few", "Q4_0 64x32 64": "many", "Q8_0 8x32 32": "many"}


def test_ways_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "folder" / "gpu.json"
    assert gpu_products.known_ways("Card", path) == {}
    gpu_products.keep_ways("Card", WAYS, path)
    assert gpu_products.known_ways("Card", path) == WAYS
    assert gpu_products.known_ways("Another", path) == {}
    monkeypatch.setattr(gpu_products, "SOFTWARE", ("strata", "no-such-package"))
    assert gpu_products.known_ways("Card", path) == {}
    assert not caplog.records
    path.write_text("{")
    assert gpu_products.known_ways("Card", path) == {}
    assert "cannot be read" in caplog.text
    gpu_products.keep_ways("Card", WAYS, path / "below")
    assert "cannot be kept" in caplog.text


def test_they_are_described_by_matrix() -> None:
    assert gpu_products.describe(WAYS) == "Q4_0 64x32 32: few, 64: many; Q8_0 8x32 32: many"


def test_shapes_are_those_of_layers_and_head(tmp_path: Path) -> None:
    path = models.write_model(tmp_path / "m.gguf", models.spec_of("mixtral"), "Q4_K")
    with GGUFFile.open(path) as gguf:
        shapes = gpu_products.shapes_of(gguf)
    assert shapes.count(ProductShape("Q4_K", 256, 256)) >= 2 * 3 * 6
    assert {shape.quant_type for shape in weightiest(shapes)} == {"Q4_K", "F32"}
