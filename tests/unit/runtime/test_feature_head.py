"""A head on the target's hidden states: its arithmetic, what it refuses, and answers as without it."""

import numpy as np
import pytest

from offload.errors import ModelFormatError, RequestError
from runtime.engine import Engine
from runtime.executor.base import Step
from runtime.models import DEMO_MODEL
from runtime.sampler import SamplingParams
from runtime.speculative.feature_head import HeadSource
from runtime.speculative.head_program import HeadProgram
from runtime.speculative.head_weights import HeadWeights
from runtime.speculative.options import DraftOptions

VOCAB, WIDTH = 4096, 256  # of the built-in model


def arrays(rng, width=WIDTH, vocab=VOCAB, inner=8):
    shapes = {
        "w1": (width, width),
        "w2": (width, width),
        "wz": (2 * width, width),
        "wu": (width, inner),
        "wd": (inner, width),
        "embedding": (vocab, width),
    }
    return {name: rng.normal(0, 0.1, shape).astype(np.float16) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    path = tmp_path_factory.mktemp("head") / "head.npz"
    np.savez(path, **arrays(np.random.default_rng(1)))
    return path


@pytest.mark.parametrize(("width", "inner"), [(256, 512), (64, 24), (48, 40)])
def test_the_next_feature_is_the_gated_sum_and_its_residual(width, inner, tmp_path, demo_engine):
    path = tmp_path / "head.npz"
    np.savez(path, **arrays(np.random.default_rng(1), width, 32, inner))
    weights = HeadWeights.load(path)
    rng, token = np.random.default_rng(2), 7
    program = HeadProgram(weights)

    def silu(x):
        return x / (1 + np.exp(-x))

    def norm(x):
        return x / np.sqrt((x**2).mean() + 1e-6)

    def weight(name):
        return getattr(weights, name).astype(np.float64)

    for feature in rng.normal(size=(2, width)).astype(np.float32):
        first = weight("w1").T @ feature
        second = silu(weight("w2").T @ norm(weight("embedding")[token]))
        gate = 1 / (1 + np.exp(-(weight("wz").T @ np.r_[first, second])))
        fused = gate * first + (1 - gate) * second
        expected = fused + weight("wd").T @ silu(weight("wu").T @ norm(fused))
        program.put(feature, token)
        demo_engine.executor.compute(program.program)
        np.testing.assert_allclose(program.feature(), expected, rtol=1e-4, atol=1e-4)


def test_features_are_what_the_logits_come_from(demo_engine):
    executor = demo_engine.executor
    kv = executor.new_kv(16)
    rows = executor.forward([Step([5, 6, 7, 8, 9], kv)], logits="all")[0]
    features = executor.features(5)
    assert features.shape == (5, WIDTH)
    one_by_one = executor.new_kv(16)
    for index, token in enumerate([5, 6, 7, 8, 9]):
        executor.forward([Step([token], one_by_one)])
        np.testing.assert_array_equal(executor.features(1)[0], features[index])
    np.testing.assert_array_equal(executor.read_features(features), rows)
    np.testing.assert_array_equal(executor.features(1)[0], features[4])
    with pytest.raises(ValueError, match="features of 2 tokens after a run of 1"):
        executor.features(2)


@pytest.mark.parametrize("source", ["{}", "{},ngram"])
def test_answers_are_those_of_plain_decoding(source, head, demo_engine):
    options = DraftOptions(source.format(head), most=4, forced=True)
    with Engine(DEMO_MODEL, threads=1, draft=options) as engine:
        for sampling in (SamplingParams(temperature=0), SamplingParams(seed=3)):
            said = [p.token_id for p in engine.generate("Once upon a time", max_tokens=24, sampling=sampling)]
            plain = demo_engine.generate("Once upon a time", max_tokens=24, sampling=sampling)
            assert said == [p.token_id for p in plain]
            assert engine.speculation.totals.passes > 0
            assert engine.speculation.totals.failure is None


def test_a_head_for_another_model_is_refused(tmp_path, demo_engine):
    path = tmp_path / "head.npz"
    np.savez(path, **arrays(np.random.default_rng(1), width=64))
    with pytest.raises(RequestError, match="width of 64; the model has 4096 and 256"):
        HeadSource(path, demo_engine.executor, width=WIDTH, vocab_size=VOCAB)


@pytest.mark.parametrize("damage", ["text", "missing", "shape", "number"])
def test_a_file_that_is_no_head_is_refused(damage, tmp_path):
    path = tmp_path / "head.npz"
    values = arrays(np.random.default_rng(1), width=16, vocab=32)
    if damage == "missing":
        del values["wz"]
    elif damage == "shape":
        values["wu"] = values["wu"][:3]
    elif damage == "number":
        values["w1"][0, 0] = np.nan
    np.savez(path, **values)
    if damage == "text":
        path.write_text("not a head")
    with pytest.raises(ModelFormatError, match="draft head"):
        HeadWeights.load(path)
