"""The ways of a model's products are measured on its GPU once, kept, and shown by the doctor."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from gpu_kernels.capabilities import GpuCapabilities
from gpu_kernels.dispatch import Measured
from gpu_kernels.gpu_path import GpuPath
from offload.gguf import GGUFFile
from planner import gpu_products
from runtime import backend
from runtime.cli import doctor
from tests.support import models


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_what_is_measured_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []

    def kernels_for(torch_device: str, *, is_simulated: bool = False, measured: Measured | None = None) -> str:
        if measured is not None:
            assert any(shape.quant_type == "Q4_K" for shape in measured.shapes)
            seen.append(dict(measured.ways))
            measured.ways["Q4_K 256x256 32"] = "few"
        return f"{torch_device} {is_simulated}"

    monkeypatch.setattr("gpu_kernels.dispatch.kernels_for", kernels_for)
    path = models.write_model(tmp_path / "m.gguf", models.spec_of("llama"), "Q4_K")
    card = SimpleNamespace(name="Card", torch_device="cuda:0", is_simulated=False)
    simulated = SimpleNamespace(name="simulated GPU", torch_device="cpu", is_simulated=True)
    with GGUFFile.open(path) as gguf:
        assert backend._gpu_kernels(gguf, simulated) == "cpu True"
        for _ in range(2):
            assert backend._gpu_kernels(gguf, card) == "cuda:0 False"
    assert seen == [{}, {"Q4_K 256x256 32": "few"}]
    assert gpu_products.known_ways("Card") == {"Q4_K 256x256 32": "few"}


def test_the_doctor_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = GpuCapabilities("Card", 8 << 30, 7 << 30, (8, 6), "cuda:0")
    monkeypatch.setattr(doctor.capabilities, "detect", lambda: gpu)
    monkeypatch.setattr(doctor, "gpu_path", lambda _: GpuPath("Triton kernels", True))
    assert [finding.name for finding in doctor._gpu()] == ["gpu", "gpu path"]
    gpu_products.keep_ways("Card", {"Q4_K 256x256 32": "few", "Q4_K 256x256 64": "many"})
    found = doctor._gpu()[-1]
    assert (found.name, found.value) == ("gpu products", "Q4_K 256x256 32: few, 64: many")
