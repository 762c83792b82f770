"""Row 9: NaN or infinity in an expert that the GPU alone reads, since RAM does not hold all: found, and named."""

from pathlib import Path

import numpy as np
import pytest

from offload.errors import ModelFormatError
from offload.gguf import GGUFFile
from runtime.executor import Step
from runtime.executor.hybrid import HybridPlacement
from runtime.finite import FiniteCheck
from tests.support import models
from tests.support.hybrid import BRINGING_FROM_FLASH, hybrid

BOTH = frozenset({0, 1})
NAME, EXPERT = "blk.1.ffn_up_exps.weight", 2
DAMAGE = {"Q8_0": np.float16("nan"), "BF16": np.uint16(0x7FC0), "MXFP4": np.uint8(255), "F32": np.float32("-inf")}


def damaged(path: Path, quant_type: str) -> Path:
    """A model whose expert holds a weight that is no number."""
    models.write_model(path, models.spec_of("mixtral"), quant_type)
    with GGUFFile.open(path) as file:
        offset, num_bytes = file.tensors[NAME].expert_slice(EXPERT)
    with path.open("r+b") as stream:
        stream.seek(offset + num_bytes // 2)
        stream.write(DAMAGE[quant_type].tobytes())
    return path


@pytest.mark.parametrize("quant_type", DAMAGE)
def test_on_load(quant_type: str, tmp_path: Path) -> None:
    path = damaged(tmp_path / "model.gguf", quant_type)
    placement = HybridPlacement(BOTH, BOTH, output=True, expert_slots=2, seeds=((1, EXPERT),))
    with (
        pytest.raises(ModelFormatError, match=f"model.gguf: tensor {NAME} holds weights that are not finite"),
        hybrid(path, placement, stream_slots=6),
    ):
        pass


def test_when_it_is_brought(tmp_path: Path) -> None:
    path = damaged(tmp_path / "model.gguf", "F32")
    placement = HybridPlacement(BOTH, BOTH, output=True, expert_slots=2, brought_slots=6)
    with hybrid(path, placement, rates=BRINGING_FROM_FLASH, stream_slots=6) as runner:
        kv = runner.new_kv(64)
        with pytest.raises(ModelFormatError, match=f"tensor {NAME}"):
            runner.forward([Step(models.prompt(length=40), kv)])
        assert kv.length == 0


def test_rows_that_are_sound(tmp_path: Path) -> None:
    for quant_type in (*DAMAGE, "Q4_K"):
        path = models.write_model(tmp_path / f"{quant_type}.gguf", models.spec_of("mixtral"), quant_type)
        with GGUFFile.open(path) as file:
            tensor = file.tensors[NAME]
            rows = file.read(tensor, EXPERT).reshape(tensor.shape[1], -1)
            FiniteCheck(path).rows(tensor, rows)
