"""Drafts on the trained models: the text of plain decoding for questions and code, from every source and depth.

The whole set is that of scripts/check_drafts.py.
"""

from pathlib import Path

import pytest

from offload.gguf import GGUFFile
from runtime.engine import Engine
from runtime.executor.hybrid.executor import HybridExecutor
from runtime.models import DEMO_DRAFT, DEMO_MODEL
from runtime.sampler import SamplingParams
from runtime.speculative.options import NGRAM, OFF, DraftOptions
from scripts.check_drafts import OWN_PROMPTS, Target, check_target, every_prompt, plan_of

PLACES = ("ram", "streamed", "gpu", "hybrid", "shared")


@pytest.mark.parametrize("place", PLACES)
def test_texts_of_the_built_in_model_are_those_of_plain_decoding(place: str) -> None:
    target = Target(DEMO_MODEL, place, DEMO_DRAFT)
    found = check_target(target, OWN_PROMPTS[:2], depths=(1, 5, 16), tokens=12)
    assert {name: (one.different, one.failure) for name, one in found.items()} == dict.fromkeys(found, (0, None))
    assert sum(one.accepted for one in found.values()) > 0
    assert sum(one.verified > one.accepted for one in found.values()) >= 3


@pytest.mark.parametrize(
    ("target", "draft"),
    [
        ("stories260K-F32", "bitnet-3M-scale-TQ2_0"),
        ("stories260K-moe8u4-F32", "stories260K-F32"),
        ("stories260K-Q8_0", "stories260K-Q8_0"),
    ],
)
def test_texts_are_those_of_plain_decoding(shared_data: Path, target: str, draft: str) -> None:
    """A draft that is the target itself is right in every pass."""
    folder = shared_data / "models"
    prompts = every_prompt(shared_data / "prompts")[:4]
    chosen = Target(folder / f"{target}.gguf", "ram", folder / f"{draft}.gguf")
    found = check_target(chosen, prompts, depths=(1, 5, 16), tokens=20)
    assert {name: (one.different, one.failure) for name, one in found.items()} == dict.fromkeys(found, (0, None))
    if target == draft:
        assert found["model"].accepted >= found["model"].passes


@pytest.mark.parametrize("source", [OFF, NGRAM])
def test_experts_that_two_devices_share_stay_on_theirs_where_there_may_be_drafts(source: str) -> None:
    """They round differently: which of them computes an expert must not depend on what ran before."""
    with GGUFFile.open(DEMO_MODEL) as gguf:
        plan = plan_of(gguf, "shared")
    with Engine(DEMO_MODEL, plan, draft=DraftOptions(source)) as engine:
        list(engine.generate(OWN_PROMPTS[0], max_tokens=24, sampling=SamplingParams(temperature=0)))
        assert isinstance(engine.executor, HybridExecutor)
        counts = engine.executor.gpu_expert_counts
    assert counts is not None
    assert counts.misses > 0
    assert (counts.read_ahead == 0) == (source == NGRAM)
