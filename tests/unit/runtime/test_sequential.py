"""The reference forward pass: chunks, batches, caches, errors, and its parts against slower ones."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import ModelFormatError, RequestError
from runtime.architectures.base import Rope, RopeOrder, RopeScaling
from runtime.executor import Step, layers
from runtime.executor.rotary import RotaryTable, magnitude, scaled
from runtime.executor.sequential import SequentialExecutor
from tests.support import models, running
from tests.support.models import generated

IDS = models.prompt(length=24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def logits_in_chunks(runner: SequentialExecutor, ids: list[int], chunks: list[int]) -> np.ndarray:
    kv = runner.new_kv(len(ids))
    parts = []
    for size in chunks:
        step = ids[kv.length : kv.length + size]
        if step:
            parts.append(runner.forward([Step(step, kv)], logits="all")[0])
    if kv.length < len(ids):
        parts.append(runner.forward([Step(ids[kv.length :], kv)], logits="all")[0])
    return np.concatenate(parts)


@pytest.mark.parametrize("name", models.FAMILIES)
@settings(max_examples=5, deadline=None)
@given(chunks=st.lists(st.integers(1, 9), max_size=8))
def test_prefill_in_chunks_is_prefill_at_once(name: str, chunks: list[int], folder: Path) -> None:
    with running.executor(generated(folder, name), kv_dtype=torch.float32) as runner:
        whole = logits_in_chunks(runner, IDS, [])
        np.testing.assert_allclose(logits_in_chunks(runner, IDS, chunks), whole, atol=5e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3moe", "gemma3"])
def test_a_sequence_does_not_depend_on_its_batch(name: str, folder: Path) -> None:
    sequences = [models.prompt(seed, length) for seed, length in ((1, 5), (2, 1), (3, 17))]
    with running.executor(generated(folder, name)) as runner:
        caches = [runner.new_kv(32) for _ in sequences]
        together = runner.forward([Step(ids, kv) for ids, kv in zip(sequences, caches, strict=True)], logits="all")
        then = runner.forward([Step([7], kv) for kv in caches])
        for index, ids in enumerate(sequences):
            kv = runner.new_kv(64)
            np.testing.assert_array_equal(runner.forward([Step(ids, kv)], logits="all")[0], together[index])
            np.testing.assert_array_equal(runner.forward([Step([7], kv)])[0], then[index])


@pytest.mark.parametrize("quant_type", models.QUANT_TYPES)
def test_weights_kept_as_stored_give_the_same_bits(quant_type: str, folder: Path) -> None:
    path = generated(folder, "qwen2moe", quant_type)
    rows = []
    for resident in (True, False):
        with running.executor(path, resident=resident) as runner:
            rows.append(runner.forward([Step(IDS, runner.new_kv(32))])[0])
    np.testing.assert_array_equal(*rows)


def test_logits_asked_for(folder: Path) -> None:
    with running.executor(generated(folder, "llama")) as runner:
        every = runner.forward([Step(IDS, runner.new_kv(32))], logits="all")[0]
        last = runner.forward([Step(IDS, runner.new_kv(32))])[0]
        none = runner.forward([Step(IDS, runner.new_kv(32))], logits="none")[0]
    assert every.shape == (len(IDS), models.VOCAB)
    assert every.dtype == last.dtype == none.dtype == np.float32
    assert none.shape == (0, models.VOCAB)
    np.testing.assert_allclose(last, every[-1:], atol=1e-5)


def test_truncating_a_cache_takes_tokens_back(folder: Path) -> None:
    with running.executor(generated(folder, "llama")) as runner:
        kv = runner.new_kv(32)
        runner.forward([Step(IDS[:10], kv)])
        expected = runner.forward([Step([5], kv)])[0]
        runner.forward([Step([6, 7], kv)])
        kv.truncate(10)
        np.testing.assert_array_equal(runner.forward([Step([5], kv)])[0], expected)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "without tokens"),
        ([1, models.VOCAB], "token 384 is not in the vocabulary of 384"),
        ([-1], "token -1 is not"),
        ([1] * 9, "9 tokens do not fit in a context of 8"),
    ],
)
def test_bad_steps_change_nothing(ids: list[int], message: str, folder: Path) -> None:
    with running.executor(generated(folder, "llama")) as runner:
        good, bad = runner.new_kv(8), runner.new_kv(8)
        with pytest.raises(RequestError, match=message):
            runner.forward([Step([1, 2], good), Step(ids, bad)])
        assert good.length == bad.length == 0
        with pytest.raises(ValueError, match="share"):
            runner.forward([Step([1], good), Step([2], good)])
        with pytest.raises(ValueError, match="another executor"):
            runner.forward([Step([1], SimpleNamespace(length=0, capacity_tokens=8, truncate=lambda length: None))])


def test_a_failure_in_the_middle_leaves_caches_as_they_were(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running.executor(generated(folder, "llama")) as runner:
        caches = [runner.new_kv(32), runner.new_kv(32)]
        runner.forward([Step(IDS[:4], kv) for kv in caches])
        expected = runner.forward([Step([5], kv) for kv in caches])
        for kv in caches:
            kv.truncate(4)
        calls = iter(range(100))

        def failing(*args: object, **kwargs: object) -> torch.Tensor:
            if next(calls) == 2:
                raise ModelFormatError("in the second block")
            return attention(*args, **kwargs)

        attention = layers.attention
        monkeypatch.setattr(layers, "attention", failing)
        with pytest.raises(ModelFormatError):
            runner.forward([Step([5], kv) for kv in caches])
        assert [kv.length for kv in caches] == [4, 4]
        monkeypatch.setattr(layers, "attention", attention)
        for got, wanted in zip(runner.forward([Step([5], kv) for kv in caches]), expected, strict=True):
            np.testing.assert_array_equal(got, wanted)


def test_fused_matrices_are_the_separate_ones(folder: Path) -> None:
    """A qwen2 file whose attn_qkv stacks the three matrices and biases gives the logits of the file that has them."""
    import gguf

    spec = models.FAMILIES["qwen2"]
    separate = generated(folder, "qwen2")
    reader = gguf.GGUFReader(separate)
    weights = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    fused = folder / "fused.gguf"
    writer = gguf.GGUFWriter(fused, "qwen2")
    models._add_metadata(writer, spec)
    models.add_spm_vocabulary(writer, models.VOCAB)
    for index in range(spec.blocks):
        for ending in ("weight", "bias"):
            parts = [weights.pop(f"blk.{index}.attn_{part}.{ending}") for part in "qkv"]
            weights[f"blk.{index}.attn_qkv.{ending}"] = np.concatenate(parts)
    for name, data in weights.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    np.testing.assert_allclose(running.logits_of(fused, IDS), running.logits_of(separate, IDS), atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 12),
    before=st.integers(0, 12),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    window=st.one_of(st.none(), st.integers(1, 30)),
    softcap=st.one_of(st.none(), st.just(2.0)),
    block=st.integers(1, 200),
)
def test_attention_is_what_a_loop_over_tokens_gives(
    *, tokens: int, before: int, kv_heads: int, group: int, window: int | None, softcap: float | None, block: int
) -> None:
    generator = torch.Generator().manual_seed(tokens + 100 * before)
    queries = torch.randn(tokens, kv_heads * group, 8, generator=generator)
    keys = torch.randn(kv_heads, before + tokens, 8, generator=generator).half()
    values = torch.randn(kv_heads, before + tokens, 6, generator=generator).half()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "SCORES_IN_MEMORY", block)
        got = layers.attention(queries, keys, values, scale=0.3, window=window, softcap=softcap)
    for token in range(tokens):
        for head in range(kv_heads * group):
            position = before + token
            first = 0 if window is None else max(0, position - window + 1)
            scores = keys[head // group, first : position + 1].float() @ queries[token, head] * 0.3
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            expected = torch.softmax(scores, 0) @ values[head // group, first : position + 1].float()
            torch.testing.assert_close(got[token, head], expected)


@pytest.mark.parametrize("order", RopeOrder)
def test_rotation_is_multiplication_of_complex_numbers(order: RopeOrder) -> None:
    rope = Rope(order, 8, 100.0)
    x = torch.randn(5, 2, 10, generator=torch.Generator().manual_seed(1))
    cos, sin = (torch.from_numpy(table)[:, None] for table in RotaryTable(rope).at(3, 8))
    rotate = layers.rotate_neighbours if order is RopeOrder.NORM else layers.rotate_halves
    got = rotate(x, cos, sin)
    for position in range(5):
        for pair in range(4):
            first, second = (2 * pair, 2 * pair + 1) if order is RopeOrder.NORM else (pair, pair + 4)
            turn = np.exp(1j * (position + 3) * 100.0 ** (-2 * pair / 8))
            for head in range(2):
                turned = complex(x[position, head, first], x[position, head, second]) * turn
                assert complex(got[position, head, first], got[position, head, second]) == pytest.approx(turned)
    assert torch.equal(got[..., 8:], x[..., 8:])


def test_a_rotary_table_grows_without_changing() -> None:
    rope = Rope(RopeOrder.NEOX, 64, 10000.0)
    table, other = RotaryTable(rope), RotaryTable(rope)
    early = table.at(0, 10)
    late = table.at(990, 1000)
    assert np.array_equal(early[0], other.at(0, 1000)[0][:10])
    assert np.array_equal(late[1], other.at(0, 1000)[1][990:])


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones() -> None:
    rope = Rope(RopeOrder.NEOX, 64, 10000.0, RopeScaling.YARN, 4.0, 4096)
    angles = 10000.0 ** (-2.0 * np.arange(32, dtype=np.float64) / 64)
    ratio = scaled(angles, rope) / angles
    assert ratio[0] == 1.0
    assert ratio[-1] == 0.25
    assert (np.diff(ratio) <= 0).all()
    assert magnitude(rope) == pytest.approx(1 + 0.1 * math.log(4))
    assert magnitude(Rope(RopeOrder.NEOX, 64, 1e4, RopeScaling.YARN, 0.5, 64, attn_factor=1.5)) == 1.5


def test_expert_weights() -> None:
    router_logits = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4]]))
    ids, weights = layers.choose_experts(router_logits, 2, norm=False, scale=1.0)
    assert ids.tolist() == [[3, 2]]
    torch.testing.assert_close(weights, torch.tensor([[0.4, 0.3]]))
    _, weights = layers.choose_experts(router_logits, 2, norm=True, scale=2.5)
    torch.testing.assert_close(weights, torch.tensor([[0.4, 0.3]]) / 0.7 * 2.5)
