"""Drafts on the trained models: the text of plain decoding for questions and code, from every source and depth."""

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from runtime.engine import Engine
from runtime.sampler import SamplingParams
from runtime.speculative.options import DraftOptions

TOKENS = 40
SAMPLINGS = (SamplingParams(temperature=0), SamplingParams(seed=11), SamplingParams(seed=12, repetition_penalty=1.2))


def prompts(folder: Path) -> Iterator[str]:
    """A few questions of MT-bench and functions of HumanEval."""
    for line in (folder / "mt_bench_question.jsonl").read_text().splitlines()[:3]:
        yield json.loads(line)["turns"][0]
    for line in gzip.decompress((folder / "HumanEval.jsonl.gz").read_bytes()).decode().splitlines()[:3]:
        yield json.loads(line)["prompt"]


def said(engine: Engine, texts: Sequence[str]) -> list[list[int]]:
    """Answers under every sampling in turn."""
    found = []
    for number, text in enumerate(texts):
        ids = engine.prompt_ids(text)[-120:]
        sampling = SAMPLINGS[number % len(SAMPLINGS)]
        found.append([piece.token_id for piece in engine.generate(ids, max_tokens=TOKENS, sampling=sampling)])
    return found


@pytest.mark.parametrize(
    ("target", "draft"),
    [
        ("stories260K-F32", "bitnet-3M-scale-TQ2_0"),
        ("stories260K-Q8_0", "stories260K-Q8_0"),
        ("stories260K-moe8u4-F32", "stories260K-F32"),
        ("stories260K-qwen2moe4u4-F32", None),
        ("bitnet-3M-scale-TQ1_0", "stories260K-Q8_0"),
        ("demo/strata-demo-moe-Q4_0", "demo/strata-demo-draft-F16"),
    ],
)
def test_texts_are_those_of_plain_decoding(shared_data: Path, target: str, draft: str | None) -> None:
    """Depths 1 to 16; a draft that is the target itself is always right."""
    folder = shared_data / "models"
    texts = list(prompts(shared_data / "prompts"))
    path = folder / f"{target}.gguf"
    with Engine(path, threads=1, context_tokens=200) as engine:
        reference = said(engine, texts)
    sources = ["ngram", *([str(folder / f"{draft}.gguf"), f"{folder / draft}.gguf,ngram"] if draft else [])]
    for source in sources:
        for most in (1, 5, 16):
            options = DraftOptions(source, most=most, forced=True)
            with Engine(path, threads=1, context_tokens=200, draft=options) as engine:
                assert said(engine, texts) == reference
                totals = engine.speculation.totals if engine.speculation else None
                assert totals is not None
                assert totals.failure is None
                if target == draft and source.endswith("gguf"):
                    assert totals.acceptance_rate == 1.0
