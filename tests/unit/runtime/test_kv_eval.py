"""Scores of the KV cache's types: float16 beside itself, coarser types worse, needles, what is refused."""

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cpu_kernels.kv_policy import F16_POLICY, KVPolicy
from cpu_kernels.kv_types import KVType
from offload.errors import ModelFormatError, RequestError
from runtime.cli.main import State, app
from runtime.executor import Step
from runtime.kv_eval import NEEDLE_TOKENS, PolicyScore, evaluate
from runtime.models import DEMO_MODEL
from runtime.perplexity import perplexity
from runtime.plot_kv_eval import plot_scores
from tests.support import programs

TEXT = Path(__file__).read_text("utf-8") * 2


def test_policies_beside_float16() -> None:
    policies = [F16_POLICY, *(KVPolicy(kind, kind, keeps_edges=False) for kind in (KVType.Q8_0, KVType.KIVI2))]
    ids = [int(token) for token in np.random.default_rng(0).integers(3, 1000, 300)]
    with programs.executor(DEMO_MODEL, threads=2) as runner:
        scores = evaluate(runner, ids, policies, context_tokens=140, bos_id=1)

        def logits(tokens: list[int]) -> np.ndarray:
            return runner.forward([Step(tokens, runner.new_kv(140))], logits="all")[0]

        expected = perplexity(logits, ids, context_tokens=140, bos_id=1)
    plain, same, q8_0, kivi2 = scores
    # perplexity scores the same tokens, but for the first behind the half
    assert plain.perplexity == pytest.approx(expected.value, rel=0.05)
    assert (same.divergence, same.same_top, same.perplexity) == (0, 1, plain.perplexity)
    assert 0 < q8_0.divergence < 0.01 < kivi2.divergence
    assert q8_0.share < 0.55
    assert kivi2.worst > kivi2.divergence
    assert plain.retrieved is not None


def test_a_needle_is_found_by_a_model_that_repeats() -> None:
    class Repeating:
        """Goes on as the same two tokens went on before."""

        def __init__(self) -> None:
            self.seen: list[int] = []

        def new_kv(self, _capacity: int, _policy: KVPolicy) -> object:
            self.seen = []

            class Cache:
                num_bytes, abstracts = 1, None

            return Cache()

        def forward(self, steps: list, *, logits: str) -> list[np.ndarray]:
            rows = []
            for token in steps[0].token_ids:
                self.seen.append(token)
                pairs = zip(self.seen, self.seen[1:], self.seen[2:], strict=False)
                after = {(first, second): third for first, second, third in pairs}
                row = np.zeros(400, np.float32)
                row[after.get((self.seen[-2] if len(self.seen) > 1 else 0, token), 0)] = 9.0
                rows.append(row)
            return [np.stack(rows)]

    ids = [int(token) for token in np.random.default_rng(1).permutation(400)]
    scores = evaluate(Repeating(), ids, [], context_tokens=100, bos_id=None)  # type: ignore[arg-type]
    assert scores[0].retrieved is not None
    assert scores[0].retrieved > 0.9


def test_what_is_refused() -> None:
    with programs.executor(DEMO_MODEL) as runner:
        with pytest.raises(RequestError, match="a context of 10 tokens"):
            evaluate(runner, [1] * 100, [], context_tokens=10, bos_id=None)
        with pytest.raises(RequestError, match="100 tokens of text do not fill a context of 200"):
            evaluate(runner, [1] * 100, [], context_tokens=200, bos_id=None)

    class Broken:
        def new_kv(self, _capacity: int, _policy: KVPolicy) -> None: ...

        def forward(self, steps: list, *, logits: str) -> list[np.ndarray]:
            return [np.full((len(steps[0].token_ids), 9), np.nan, np.float32)]

    with pytest.raises(ModelFormatError, match="not finite"):
        evaluate(Broken(), [1] * 100, [], context_tokens=64, bos_id=None)  # type: ignore[arg-type]
    assert NEEDLE_TOKENS == 16


def test_the_command_and_its_picture(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, "utf-8")
    options = ["-m", "demo", "-f", str(text), "-c", "64", "--chunks", "1", "-ctk", "q4_0", "-ctv", "q8_0", "-t", "1"]
    result = CliRunner().invoke(app, ["kv-eval", *options], obj=State())
    assert result.exit_code == 0, result.output
    assert "| q4_0/q8_0 |" in result.stdout
    assert "| f16/f16 | 100.0% |" in result.stdout
    pytest.importorskip("matplotlib")
    scores = [PolicyScore(name, 0.5, 5.0, 1e-3, 1e-2, 0.9, None) for name in ("f16/f16", "q8_0/q8_0")]
    plot_scores(scores, "demo", tmp_path / "scores.png")
    assert (tmp_path / "scores.png").stat().st_size > 1000
    with pytest.raises(RequestError, match="cannot write the picture"):
        plot_scores(scores, "demo", tmp_path / "missing" / "scores.png")
