"""Check that drafts leave answers as they are: tokens of plain decoding, from every source, at depths of 1 to 16.

    python scripts/check_drafts.py [TARGET...] [--list] [--first 0] [--prompts 100] [--depths 4] [--tokens 24]
        [--models FOLDER]

Targets are the built-in model and the trained ones beside the project, where they lie: all in RAM, with experts
streamed, wholly on a simulated GPU, split between it and the CPU, and with experts that these two share; `TARGET` is a
part of a name that --list shows.
Sources are a draft model, lookup, both, a feature head with random weights, and synthetic drafts, free and at a head's
cost. Every prompt (MT-bench and HumanEval in equal numbers; without them the project's own) is answered greedily and
with a seed, with each source at `--depths` of the sixteen depths, which rotate from prompt to prompt; `--first` leaves
prompts out, so that a long check can be made in pieces. Every draft is verified. Prints a line a target and source, and
fails where an answer differs.
"""

import argparse
import gzip
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np

from offload.gguf import GGUFFile
from offload.tiers import Device, Tier
from planner.hybrid_needs import needs_of, placements_of
from planner.hybrid_parts import parts
from planner.hybrid_split import Split
from planner.model_shape import ModelShape, UnitKind
from planner.plan import Plan
from planner.solve import HYBRID, plan_here
from planner.streamed import streamed_needs
from runtime.engine import Engine
from runtime.models import DEMO_DRAFT, DEMO_MODEL
from runtime.sampler import SamplingParams
from runtime.speculative.options import NGRAM, OFF, DraftOptions
from runtime.speculative.speculation import Speculation, make_speculation

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
OWN_PROMPTS = (
    "Once upon a time there was a little dog who wanted to see the sea.",
    "The cat sat on the mat. The dog sat on the rug. The cat sat on the mat. The dog",
    "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return a - b\n\ndef mul(a, b):\n    return",
    "Write a short letter to your grandmother in which you thank her for the book.",
)
SAMPLINGS = (SamplingParams(temperature=0), SamplingParams(seed=11, repetition_penalty=1.1))
GPU = "sim:vram=256MiB,bw=4000GB/s,link=400GB/s,tflops=100,launch=0us,link_latency=0us"
PROMPT_TOKENS = 60
MOST = 16
CHANCE = 0.7


@dataclass(frozen=True, slots=True)
class Target:
    """A model and where it runs: "ram", "streamed", "gpu", "hybrid" or "shared"; `draft`: a smaller model for it."""

    path: Path
    place: str
    draft: Path

    @property
    def name(self) -> str:
        """As --list shows it."""
        return f"{self.path.stem}/{self.place}"


@dataclass(frozen=True, slots=True)
class Source:
    """A source under its name for people, and what is asked of it."""

    name: str
    text: str
    synthetic: float | None = None


@dataclass(slots=True)
class Found:
    """What the answers with one source showed."""

    answers: int = 0
    different: int = 0
    passes: int = 0
    verified: int = 0
    accepted: int = 0
    failure: str | None = None

    def add(self, speculation: Speculation) -> None:
        """Count the passes of one answer."""
        totals = speculation.totals
        self.passes += totals.passes
        self.verified += totals.verified
        self.accepted += sum(totals.accepted)
        self.failure = self.failure or totals.failure


def every_target(models: Path) -> list[Target]:
    """The built-in model, and those of `models` that are there."""
    dense = (
        "stories260K-F32",
        "stories260K-Q8_0",
        "bitnet-3M-scale-TQ1_0",
        "bitnet-3M-scale-TQ2_0",
        "bitnet-3M-Q4_K_M",
    )
    routed = ("stories260K-moe8u4-F32", "stories260K-moe8u8-Q8_0", "stories260K-qwen2moe4u4-F32")
    found = [Target(DEMO_MODEL, place, DEMO_DRAFT) for place in ("ram", "streamed", "gpu", "hybrid", "shared")]
    for name in (*dense, *routed):
        draft = models / ("stories260K-Q8_0.gguf" if name.startswith("bitnet") else "bitnet-3M-scale-TQ2_0.gguf")
        gpu = ("gpu", "hybrid") if "F32" in name or "Q8_0" in name else ()
        places = ("ram", *gpu, *(("streamed", "shared") if name in routed else ()))
        found += [Target(models / f"{name}.gguf", place, draft) for place in places]
    return [target for target in found if target.path.is_file() and target.draft.is_file()]


def every_prompt(folder: Path) -> list[str]:
    """Questions of MT-bench and functions of HumanEval in turn; without those the project's own."""
    if not folder.is_dir():
        return list(OWN_PROMPTS)
    asked = (folder / "mt_bench_question.jsonl").read_text().splitlines()
    code = gzip.decompress((folder / "HumanEval.jsonl.gz").read_bytes()).decode().splitlines()
    pairs = zip(asked, code, strict=False)
    return [text for one, two in pairs for text in (json.loads(one)["turns"][0], json.loads(two)["prompt"])]


def plan_of(gguf: GGUFFile, place: str) -> Plan:
    """A plan that puts the model there, whatever would be quicker."""
    gpu = GPU if place in ("gpu", "hybrid", "shared") else "off"
    options = {"context_tokens": PROMPT_TOKENS + 4 * MOST, "threads": 1}
    plan = plan_here(gguf, gpu=gpu, loop=HYBRID if gpu == GPU else "auto", **options)  # type: ignore[arg-type]
    shape = ModelShape.from_gguf(gguf)
    if place == "streamed":
        return _streamed(plan, shape)
    return _split(plan, shape, place) if gpu == GPU else plan


def _streamed(plan: Plan, shape: ModelShape) -> Plan:
    """Room in RAM for a little more than the experts that two tokens use."""
    settings = replace(plan.settings, stream_slots=2 * shape.expert_used_count + 1)
    placed = (
        replace(placement, tier=Tier.FLASH) if placement.kind is UnitKind.EXPERTS else placement
        for placement in plan.placements
    )
    needs = streamed_needs(
        shape,
        plan.budget,
        context_tokens=settings.context_tokens,
        chunk_tokens=settings.prefill_chunk_tokens,
        slots=settings.stream_slots,
    )
    return replace(plan, settings=settings, placements=tuple(placed), needs=needs)


def _split(plan: Plan, shape: ModelShape, place: str) -> Plan:
    """All on the GPU, or every other layer, with all of their experts there or a third."""
    able = {part.layer for part in parts(shape) if part.may_be_on_gpu and part.layer is not None}
    wholly, is_shared = place == "gpu", place == "shared"
    layers = frozenset(layer for layer in able if wholly or layer % 2)
    resident = layers if shape.expert_count and not is_shared else frozenset()
    slots = len(layers) * shape.expert_count // (3 if is_shared else 1)
    split = Split(attention=layers, feed_forward=layers, output=wholly, resident=resident, slots=slots)
    settings = replace(plan.settings, gpu_slots=slots)
    tokens = {"context_tokens": settings.context_tokens, "chunk_tokens": settings.prefill_chunk_tokens}
    needs = needs_of(shape, plan.budget, settings.device, split, **tokens)
    placed = tuple(placements_of(shape, split, settings.context_tokens))
    assert all(one.device is Device.GPU for one in placed if one.layer is not None) or not wholly
    return replace(plan, settings=settings, placements=placed, needs=needs)


def random_head(gguf: GGUFFile, path: Path) -> None:
    """A head of the right shape that foretells nothing."""
    shape, rng = ModelShape.from_gguf(gguf), np.random.default_rng(1)
    width, vocab = shape.embedding_length, shape.vocab_size
    shapes = {"w1": (width, width), "w2": (width, width), "wz": (2 * width, width)}
    shapes |= {
        "wu": (width, 2 * width),
        "wd": (2 * width, width),
        "embedding": (vocab, width),
        "output": (vocab, width),
    }
    np.savez(path, **{name: rng.normal(0, 0.1, size).astype(np.float16) for name, size in shapes.items()})  # type: ignore[arg-type]


def sources_for(target: Target, head: Path) -> Iterator[Source]:
    """Every source there is for a target; heads need its hidden states, of passes that are made as a whole."""
    yield Source("model", str(target.draft))
    yield Source("lookup", NGRAM)
    yield Source("both", f"{target.draft},{NGRAM}")
    yield Source(f"synthetic {CHANCE:g}", OFF, CHANCE)
    if target.place == "ram":
        yield Source("head", str(head))
        yield Source(f"synthetic {CHANCE:g} by head", str(head), CHANCE)


@contextmanager
def speculation_of(source: Source, depth: int, engine: Engine, gguf: GGUFFile) -> Iterator[Speculation]:
    """The source at that depth beside the engine's model, all of its drafts verified."""
    options = DraftOptions(source.text, most=depth, synthetic=source.synthetic, forced=True)
    made = make_speculation(options, gguf, engine.text, engine.plan, engine.executor)
    assert made is not None
    with made:
        yield made


def answered(engine: Engine, ids: Sequence[int], sampling: SamplingParams, tokens: int) -> list[int]:
    """The tokens of one answer."""
    return [piece.token_id for piece in engine.generate(ids, max_tokens=tokens, sampling=sampling)]


def depths_of(prompt: int, source: int, count: int) -> list[int]:
    """Which depths a prompt is answered at: over sixteen prompts every one comes as often."""
    return [1 + (prompt + source + step * MOST // count) % MOST for step in range(count)]


def check_target(
    target: Target, prompts: Sequence[str], *, depths: int | Sequence[int], tokens: int, first: int = 0
) -> dict[str, Found]:
    """Answers of all sources against those of plain decoding, at these depths or at so many that rotate.

    `first`: the number of the first of these prompts among all.
    """
    with tempfile.TemporaryDirectory() as folder, GGUFFile.open(target.path) as gguf:
        head = Path(folder) / "head.npz"
        random_head(gguf, head)
        with Engine(target.path, plan_of(gguf, target.place), draft=DraftOptions(NGRAM)) as engine:
            engine.draft_with(None)
            every = [engine.prompt_ids(text)[-PROMPT_TOKENS:] for text in prompts]
            plain = [[answered(engine, ids, sampling, tokens) for sampling in SAMPLINGS] for ids in every]
            sources = list(sources_for(target, head))
            wanted = sorted(
                (number, depth, prompt)
                for number in range(len(sources))
                for prompt in range(len(every))
                for depth in (depths_of(first + prompt, number, depths) if isinstance(depths, int) else depths)
            )
            results = {source.name: Found() for source in sources}
            for (number, depth), group in groupby(wanted, key=lambda one: one[:2]):
                found = results[sources[number].name]
                with speculation_of(sources[number], depth, engine, gguf) as speculation:
                    engine.draft_with(speculation)
                    for _, _, prompt in group:
                        for sampling, reference in zip(SAMPLINGS, plain[prompt], strict=True):
                            found.answers += 1
                            found.different += answered(engine, every[prompt], sampling, tokens) != reference
                            found.add(speculation)
                    engine.draft_with(None)
    return results


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=[""])
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--depths", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--models", type=Path, default=DATA / "models")
    options = parser.parse_args()
    chosen = [one for one in every_target(options.models) if any(word in one.name for word in options.targets)]
    if options.list:
        print("\n".join(target.name for target in chosen))
        return
    prompts = every_prompt(DATA / "prompts")[options.first :][: options.prompts]
    answers = wrong = 0
    for target in chosen:
        began = time.perf_counter()
        slices = {"depths": options.depths, "tokens": options.tokens, "first": options.first}
        for name, found in check_target(target, prompts, **slices).items():
            answers, wrong = answers + found.answers, wrong + found.different + (found.failure is not None)
            print(
                f"{target.name:36} {name:22} {found.answers:5} answers {found.different:4} differ  "
                f"{found.verified:7} drafts in {found.passes:6} passes, {found.accepted} right {found.failure or ''}",
                flush=True,
            )
        print(f"{target.name:36} {time.perf_counter() - began:.1f} s", flush=True)
    print(f"{answers} answers of {len(chosen)} targets, {wrong} differ")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
