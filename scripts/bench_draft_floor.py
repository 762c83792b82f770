"""Measure how much drafts can lose: plain and drafted answers in turn over workloads that suit drafts and that do not.

    python scripts/bench_draft_floor.py [WORKLOAD...] [--list] [--rounds 31] [--least 0.97] [--prompts FOLDER]
        [--trained FILE --trained-draft FILE] [--large FILE --large-draft FILE] [--streamed FILE --ram 2400MiB]

`WORKLOAD` is a part of a name that --list shows: a model (the built-in one, and those of the options), a text (chat,
code, summary, a text that repeats itself, random tokens) and a source. Each has one policy, which starts from the plan
and lives for all of its rounds, as in a chat; a round is an answer without drafts and one with, in alternating order.
"gain": the median of the rounds' ratios of decoding speed; "first": the first round's. Fails where the least gain is
under --least, or where a text differs.
"""

import argparse
import gzip
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from offload.gguf import GGUFFile
from planner.budget import Budget, parse_budget
from runtime.engine import Engine
from runtime.models import DEMO_DRAFT, DEMO_MODEL
from runtime.speculative.options import NGRAM, DraftOptions
from runtime.speculative.speculation import make_speculation
from scripts.bench_speculative import answer
from scripts.quiet import planned_threads

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
REPEATING = "The cat sat on the mat. The dog sat on the rug. The bird sat in the tree. "
SHORT, LONG = 48, 160  # tokens of an answer of a large model, and of a small one
MANY, FEW, FEWEST = 31, 5, 3  # rounds of a small model, a large one, and one that streams
PROMPT_TOKENS = 120


@dataclass(frozen=True, slots=True)
class Target:
    """A model under its name; `draft`: a smaller one for it. `ram`: of its budget, where it is to stream.

    `tokens` of an answer and `rounds` are what takes some ten seconds a workload.
    """

    name: str
    path: Path
    draft: Path | None = None
    tokens: int = LONG
    rounds: int = MANY
    ram: str | None = None

    @property
    def budget(self) -> Budget | None:
        """As an engine takes it."""
        return parse_budget(f"ram={self.ram}") if self.ram else None


@dataclass(frozen=True, slots=True)
class Workload:
    """A text that a target continues, with drafts of a source."""

    target: Target
    text: str
    source: str

    @property
    def name(self) -> str:
        """As --list shows it."""
        return f"{self.target.name}/{self.text}/{self.source}"

    @property
    def draft(self) -> str:
        """As --draft takes it."""
        names = {"ngram": (NGRAM,), "model": (str(self.target.draft),), "both": (str(self.target.draft), NGRAM)}
        return ",".join(names[self.source])


@dataclass(frozen=True, slots=True)
class Found:
    """What the rounds of a workload showed."""

    plain_tokens_per_s: float
    gains: tuple[float, ...]
    acceptance_rate: float | None
    off_share: float
    is_same: bool

    @property
    def gain(self) -> float:
        """Of the median round."""
        return statistics.median(self.gains)


def workloads(options: argparse.Namespace) -> list[Workload]:
    """Twenty, where all models are given."""
    demo = Target("built-in", DEMO_MODEL, DEMO_DRAFT)
    found = [
        Workload(demo, text, source) for text in ("chat", "code", "repeat", "random") for source in ("ngram", "both")
    ]
    if options.trained is not None:
        trained = Target("trained", options.trained, options.trained_draft)
        found += [Workload(trained, *each) for each in (("chat", "ngram"), ("repeat", "ngram"), ("code", "model"))]
    if options.large is not None:
        large = Target("large", options.large, options.large_draft, SHORT, FEW)
        pairs = (("chat", "ngram"), ("summary", "ngram"), ("repeat", "ngram"), ("code", "both"), ("random", "model"))
        found += [Workload(large, *each) for each in (*pairs, ("repeat", "both"))]
    if options.streamed is not None:
        streamed = Target("streamed", options.streamed, None, SHORT, FEWEST, options.ram)
        found += [Workload(streamed, text, "ngram") for text in ("chat", "summary", "repeat")]
    return found


def prompt_of(engine: Engine, text: str, folder: Path) -> list[int]:
    """The tokens that are continued."""
    if text == "random":
        return np.random.default_rng(1).integers(0, engine.tokenizer.vocab_size, PROMPT_TOKENS).tolist()
    words = {
        "chat": lambda: _first(folder / "mt_bench_question.jsonl")["turns"][0],
        "code": lambda: json.loads(gzip.decompress((folder / "HumanEval.jsonl.gz").read_bytes()).split(b"\n")[0])[
            "prompt"
        ],
        "summary": lambda: _first(folder / "spec_bench_question.jsonl", "summarization")["turns"][0],
        "repeat": lambda: REPEATING * 4,
    }[text]()
    return engine.prompt_ids(words)[-PROMPT_TOKENS:]


def _first(path: Path, category: str | None = None) -> dict[str, list[str]]:
    """The first record of a file, or of a category in it."""
    records = (json.loads(line) for line in path.read_text().splitlines())
    return next(record for record in records if category in (None, record["category"]))


def measure(engine: Engine, gguf: GGUFFile, work: Workload, ids: Sequence[int], rounds: int) -> Found:
    """Rounds of two answers; what must be compiled was compiled by one before them."""
    options, tokens = DraftOptions(work.draft), work.target.tokens
    plain, gains, is_same = [], [], True
    for warming in (True, False):
        speculation = make_speculation(options, gguf, engine.text, engine.plan, engine.executor)
        assert speculation is not None, "drafts were asked for"
        with speculation:
            for number in range(1 if warming else rounds):
                speeds, said = {}, []
                for drafts in (None, speculation) if number % 2 == 0 else (speculation, None):
                    engine.draft_with(drafts)
                    text, speeds[drafts is not None], _ = answer(engine, ids, tokens)
                    said.append(text)
                is_same = is_same and said[0] == said[1]
                if not warming:
                    plain.append(speeds[False])
                    gains.append(speeds[True] / speeds[False])
            engine.draft_with(None)
            totals = speculation.totals
    off = 1 - totals.passes / max(totals.passes + totals.plain_passes, 1)
    return Found(statistics.median(plain), tuple(gains), totals.acceptance_rate, off, is_same)


def measured(chosen: Sequence[Workload], rounds: int, folder: Path) -> Iterator[tuple[Workload, Found]]:
    """Target by target, so that each is loaded once."""
    for target, group in groupby(chosen, key=lambda work: work.target):
        context = PROMPT_TOKENS + target.tokens + 8
        with (
            GGUFFile.open(target.path) as gguf,
            planned_threads(),
            Engine(target.path, context_tokens=context, budget=target.budget) as engine,
        ):
            for work in group:
                ids = prompt_of(engine, work.text, folder)
                yield work, measure(engine, gguf, work, ids, min(rounds, target.rounds))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=[""])
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--rounds", type=int, default=MANY, help="At most.")
    parser.add_argument("--least", type=float, default=0.97)
    parser.add_argument("--prompts", type=Path, default=DATA / "prompts")
    for name in ("--trained", "--trained-draft", "--large", "--large-draft", "--streamed"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--ram", default="2400MiB", help="What the streamed model may use.")
    options = parser.parse_args()
    chosen = [work for work in workloads(options) if any(word in work.name for word in options.workloads)]
    if options.list:
        print("\n".join(work.name for work in chosen))
        return
    worst, all_same = 9.0, True
    print("| workload | plain tokens/s | gain | first | accepted | passes without drafts | same text |")
    print("|---|---:|---:|---:|---:|---:|---|")
    for work, found in measured(chosen, options.rounds, options.prompts):
        worst, all_same = min(worst, found.gain), all_same and found.is_same
        accepted = "" if found.acceptance_rate is None else f"{found.acceptance_rate:.0%}"
        print(
            f"| {work.name} | {found.plain_tokens_per_s:.1f} | {found.gain:.3f} | {found.gains[0]:.3f} | {accepted} | "
            f"{found.off_share:.0%} | {'yes' if found.is_same else 'NO'} |",
            flush=True,
        )
    print(f"{len(chosen)} workloads, the least gain {worst:.3f}")
    sys.exit(0 if worst >= options.least and all_same else 1)


if __name__ == "__main__":
    main()
