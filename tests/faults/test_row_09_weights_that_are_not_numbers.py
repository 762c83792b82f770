"""Row 9: NaN or infinity in weights or scales is found on first use and named."""

from pathlib import Path

import numpy as np
import pytest

from offload.errors import ModelFormatError
from offload.gguf import GGUFFile
from runtime.executor import Step
from tests.support import models, running

SPEC = models.Spec("qwen3moe", blocks=1, qk_norm="head", experts=4, experts_used=1)


def damaged(path: Path, quant_type: str, tensor: str, byte: int, value: np.generic) -> Path:
    """A model with `value` written at `byte` of a tensor's data."""
    models.write_model(path, SPEC, quant_type)
    with GGUFFile.open(path) as file:
        offset = file.tensors[tensor].offset + byte
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(value.tobytes())
    return path


@pytest.mark.parametrize(
    ("quant_type", "tensor", "byte", "value"),
    [
        ("F32", "blk.0.attn_norm.weight", 400, np.float32("nan")),
        ("F32", "output.weight", 4 * 256 * 383, np.float32("-inf")),
        ("F16", "token_embd.weight", 512, np.float16("inf")),
        ("Q8_0", "blk.0.attn_q.weight", 34 * 9, np.float16("nan")),
        ("Q4_K", "blk.0.attn_output.weight", 144 * 5 + 2, np.float16("inf")),
        ("Q8_0", "blk.0.ffn_down_exps.weight", 34 * 8 * 256 * 3, np.float16("nan")),
    ],
)
def test_loading_names_the_tensor(quant_type: str, tensor: str, byte: int, value: np.generic, tmp_path: Path) -> None:
    path = damaged(tmp_path / "model.gguf", quant_type, tensor, byte, value)
    with pytest.raises(ModelFormatError, match=f"model.gguf: tensor {tensor} holds weights that are not finite"):
        running.logits_of(path, [1, 2])


def test_weights_kept_as_stored_are_checked_on_first_use(tmp_path: Path) -> None:
    """Tokens whose expert is sound go on; the first that needs the damaged one fails and leaves its cache alone."""
    name = "blk.0.ffn_down_exps.weight"
    path = damaged(tmp_path / "model.gguf", "Q8_0", name, 34 * 8 * 256 * 3, np.float16("nan"))
    with running.executor(path, resident=False) as runner:
        kv = runner.new_kv(256)
        sound = failed = 0
        for token in range(3, 60):
            before = kv.length
            try:
                logits = runner.forward([Step([token], kv)])[0]
            except ModelFormatError as error:
                assert name in str(error)
                assert kv.length == before
                failed += 1
            else:
                assert np.isfinite(logits).all()
                assert kv.length == before + 1
                sound += 1
    assert sound and failed


def test_great_weights_whose_sum_overflows_are_no_fault(tmp_path: Path) -> None:
    path = damaged(tmp_path / "model.gguf", "F32", "output.weight", 0, np.full(200, 3e38, np.float32))
    assert len(running.logits_of(path, [1])) == 1


def test_divisors_of_angles_are_above_zero(tmp_path: Path) -> None:
    spec = models.Spec("llama", blocks=1, rope_factors={"rope_freqs": float})
    path = models.write_model(tmp_path / "model.gguf", spec)
    with pytest.raises(ModelFormatError, match=r"tensor rope_freqs\.weight divides angles"):
        running.logits_of(path, [1, 2])
