"""The training script end to end on a few kilobytes of text: vocabulary, training, pause and resume, export."""

import lzma
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from offload.gguf import GGUFFile
from scripts import train_demo
from scripts.train_demo import ExpertFFN, LanguageModel, Shape, Training

TINY = Shape(
    hidden=32, layers=2, heads=2, kv_heads=1, head_dim=32, ffn=64, experts=4, experts_used=2, vocabulary=400, context=32
)
DRAFT = Shape(hidden=32, layers=1, heads=2, kv_heads=1, head_dim=32, ffn=32, vocabulary=400, context=32)
SENTENCES = ["The cat sat on the mat.", "A dog ran after the red ball.", "“Hello,” said Zoë, and smiled."]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on several threads, much slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with vocabulary, tokens, and a checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("demo")
    generator = np.random.default_rng(0)
    text = "<|endoftext|>".join(" ".join(generator.choice(SENTENCES, 6)) for _ in range(60))
    (folder / "a.txt").write_text(text, encoding="utf-8")
    (folder / "b.txt.xz").write_bytes(lzma.compress(text.encode()))
    train_demo.main(
        [
            "tokenizer",
            f"{folder / 'a.txt'}:2",
            f"{folder / 'b.txt.xz'}:0.5",
            "--vocabulary",
            "400",
            "--data",
            str(folder),
        ]
    )
    training = Training(steps=20, batch=4, sequence=24, learning_rate=2e-2)
    train_demo.train(TINY, folder, folder / "moe.pt", training)
    train_demo.train(DRAFT, folder, folder / "draft.pt", training, train_demo.load(folder / "moe.pt", "cpu"))
    return folder


def test_documents_are_repeated_thinned_and_held_out(data: Path) -> None:
    ends = [int((np.fromfile(data / name, dtype=np.uint16) == 0).sum()) for name in ("train.u16", "valid.u16")]
    assert ends == [54 * 2 + 27, 6 + 6]


def test_training_lowers_the_loss(data: Path) -> None:
    torch.manual_seed(0)
    windows = train_demo.Windows(data / "valid.u16", 24, "cpu")
    untrained = train_demo.validation_loss(LanguageModel(TINY), windows, batches=2)
    trained = train_demo.validation_loss(train_demo.load(data / "moe.pt", "cpu"), windows, batches=2)
    assert trained < untrained - 0.3


def test_a_paused_training_goes_on_as_if_it_had_not_been(data: Path, tmp_path: Path) -> None:
    def weights(name: str) -> dict[str, torch.Tensor]:
        loaded: dict[str, torch.Tensor] = torch.load(tmp_path / name)["model"]
        return loaded

    whole = Training(steps=6, batch=2, sequence=16)
    train_demo.train(TINY, data, tmp_path / "whole.pt", whole)
    paused = Training(steps=6, batch=2, sequence=16, pause_minutes=0.0)
    assert train_demo.train(TINY, data, tmp_path / "parts.pt", paused) is None
    resumed = Training(steps=6, batch=2, sequence=16, resume=True)
    assert train_demo.train(TINY, data, tmp_path / "parts.pt", resumed) is not None
    for name, value in weights("whole.pt").items():
        torch.testing.assert_close(weights("parts.pt")[name], value, rtol=0, atol=0)


def test_experts_equal_a_plain_loop_over_tokens() -> None:
    torch.manual_seed(1)
    layer = ExpertFFN(TINY).eval()
    x = torch.randn(3, 5, TINY.hidden)
    expected = torch.zeros_like(x)
    for i, j in np.ndindex(3, 5):
        chances = layer.ffn_gate_inp(x[i, j]).softmax(-1)
        weights, experts = chances.topk(TINY.experts_used)
        for weight, expert in zip(weights / weights.sum(), experts.tolist(), strict=True):
            gate = torch.nn.functional.silu(layer.ffn_gate_exps[expert] @ x[i, j])
            expected[i, j] += weight * (layer.ffn_down_exps[expert] @ (gate * (layer.ffn_up_exps[expert] @ x[i, j])))
    out, balance = layer(x)
    torch.testing.assert_close(out, expected)
    assert balance.item() >= 0.99


@pytest.mark.parametrize(("quant_type", "tolerance"), [("F16", 1e-3), ("Q8_0", 1e-2)])
@pytest.mark.parametrize("kind", ["moe", "draft"])
def test_the_exported_file_holds_the_model(
    data: Path, tmp_path: Path, kind: str, quant_type: str, tolerance: float
) -> None:
    target = tmp_path / f"{kind}.gguf"
    train_demo.main(["export", kind, "--data", str(data), "--type", quant_type, "--to", str(target)])
    model = train_demo.load(data / f"{kind}.pt", "cpu")
    shape = model.shape
    with GGUFFile.open(target) as file:
        assert file.architecture == ("qwen3moe" if shape.experts else "qwen3")
        assert file.get_int(f"{file.architecture}.block_count") == shape.layers
        assert file.get_str("tokenizer.ggml.pre") == "qwen2"
        assert len(file.get_strings("tokenizer.ggml.tokens")) == shape.vocabulary
        assert file.tensors["token_embd.weight"].shape == (shape.vocabulary, shape.hidden)
        assert file.tensors["token_embd.weight"].quant_type.name == quant_type
        assert file.tensors["output_norm.weight"].quant_type.name == "F32"
        assert len(file.tensors) == 2 + shape.layers * (12 if shape.experts else 11)
        if shape.experts:
            assert file.tensors["blk.1.ffn_down_exps.weight"].shape == (4, shape.hidden, shape.ffn)
            assert file.tensors["blk.1.ffn_gate_inp.weight"].quant_type.name == "F32"
        stored = dequantized(file, "blk.0.attn_q.weight")
    wanted = model.blk[0].get_parameter("attention.attn_q.weight").detach().numpy()
    np.testing.assert_allclose(stored, wanted, atol=tolerance * np.abs(wanted).max())


def dequantized(file: GGUFFile, name: str) -> np.ndarray:
    """A tensor by the `gguf` package's own dequantisation."""
    import gguf

    tensor = file.tensors[name]
    raw = file.read(tensor).reshape(tensor.shape[0], -1)
    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[tensor.quant_type.name]).reshape(tensor.shape)


def test_a_text_that_is_too_short_is_refused(tmp_path: Path) -> None:
    np.zeros(10, dtype=np.uint16).tofile(tmp_path / "train.u16")
    with pytest.raises(SystemExit, match="10 tokens; windows of 32 need more text"):
        train_demo.main(["train", "draft", "--data", str(tmp_path), "--sequence", "32", "--steps", "1"])
