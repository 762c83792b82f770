"""Measure decoding with drafts against plain decoding on one model: a JSON line a case, then a table.

    python scripts/bench_speculative.py MODEL.gguf [--draft FILE] [--acceptance 0.5 0.7 0.9] [--tokens 64]
        [--threads 2] [--rounds 3] [--most 8] [--tree 0 32] [--prompt-tokens 64] [--simulated-step-ms MS]
        [--prompts FILE.jsonl]

Drafts are synthetic: right with the given chance, at the cost of --draft, of a simulated device that takes so long a
token and works beside the target, or of nothing. Greedy answers to random tokens (or to the texts of --prompts, by
lookup alone); plain and drafted runs alternate. "gain": the median of the rounds' ratios of decoding speed; "over
model": of their ratios to the cost model's gain by the round's own depth, acceptance and times; "over plan": the gain
over the one that was planned before it. Texts are compared.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np

from offload.gguf import GGUFFile
from planner.draft_depth import best_depth, expected_tokens
from runtime.engine import Engine
from runtime.sampler import SamplingParams
from runtime.speculative.options import NGRAM, OFF, DraftOptions
from runtime.speculative.speculation import Speculation, make_speculation, new_policy
from runtime.speculative.synthetic import SyntheticSource
from runtime.speculative.totals import Totals
from scripts.quiet import planned_threads


@dataclass(frozen=True, slots=True)
class Case:
    """One line: what was drafted, speeds in tokens a second, gains over plain decoding, and how drafts did."""

    name: str
    plain_tokens_per_s: float
    drafted_tokens_per_s: float
    gain: float
    over_model: float
    planned_gain: float | None
    acceptance_rate: float | None
    tokens_per_pass: float | None
    off_share: float
    same_text: bool
    mb_per_token_plain: float | None = None
    mb_per_token: float | None = None
    trees: int = 0
    drafts_of_a_tree: float = 0.0


@dataclass(frozen=True, slots=True)
class Round:
    """Speeds of a plain answer and a drafted one, the gain by the cost model, and what drafts did."""

    plain_tokens_per_s: float
    drafted_tokens_per_s: float
    model_gain: float
    totals: Totals

    @property
    def gain(self) -> float:
        """As measured."""
        return self.drafted_tokens_per_s / self.plain_tokens_per_s


def answer(engine: Engine, ids: Sequence[int], tokens: int) -> tuple[list[int], float, float | None]:
    """The tokens of one answer, its speed, and megabytes read from flash for each behind the first."""
    sampling = SamplingParams(temperature=0, logit_bias=dict.fromkeys(engine.tokenizer.eog_ids, -math.inf))
    said, before = [], None
    for piece in engine.generate(ids, max_tokens=tokens, sampling=sampling):
        said.append(piece.token_id)
        before = before or engine.cache_counts  # not what finding out the answer beforehand has read
    assert engine.measured is not None and engine.measured.decode_tokens_per_s is not None
    after = engine.cache_counts
    read = None if before is None or after is None else after.since(before).bytes_read / (len(said) - 1) / 1e6
    return said, engine.measured.decode_tokens_per_s, read


def compare(engine: Engine, name: str, speculation: Speculation, ids: Sequence[int], tokens: int, rounds: int) -> Case:
    """Plain and drafted answers in turn; the first round warms up.

    Gains are told round by round, beside that of the cost model for the round's own acceptance and times: a machine
    whose speed changes within minutes changes both.
    """
    source, kept, same = speculation.source, [], True
    planned = _planned(speculation, source.acceptance) if isinstance(source, SyntheticSource) else None
    read: list[float | None] = [None, None]
    for round_number in range(rounds + 1):
        engine.draft_with(None)
        text, speed, read[0] = answer(engine, ids, tokens)
        engine.draft_with(speculation)
        found, with_drafts, read[1] = answer(engine, ids, tokens)
        same = same and text == found
        if round_number:
            kept.append(Round(speed, with_drafts, _modelled(speculation), speculation.totals))
    accepted, reached = (sum(sum(getattr(one.totals, field)) for one in kept) for field in ("accepted", "reached"))
    passes, plain_passes = (sum(getattr(one.totals, field) for one in kept) for field in ("passes", "plain_passes"))
    trees = sum(one.totals.trees for one in kept)
    return Case(
        name,
        statistics.median(one.plain_tokens_per_s for one in kept),
        statistics.median(one.drafted_tokens_per_s for one in kept),
        statistics.median(one.gain for one in kept),
        statistics.median(one.gain / one.model_gain for one in kept),
        planned,
        accepted / reached if reached else None,
        sum(one.totals.tokens for one in kept) / max(passes + plain_passes, 1),
        plain_passes / max(passes + plain_passes, 1),
        same,
        mb_per_token_plain=read[0],
        mb_per_token=read[1],
        trees=trees,
        drafts_of_a_tree=sum(one.totals.tree_drafts for one in kept) / max(trees, 1),
    )


def _planned(speculation: Speculation, acceptance: float) -> float:
    """The greatest gain that was expected before anything ran."""
    policy = speculation.policy
    return best_depth([acceptance] * policy.most, policy.costs()).tokens_per_s * policy.plain_s


def _modelled(speculation: Speculation) -> float:
    """The gain by the cost model of the passes of an answer: at their depth in the mean, its acceptance and times."""
    policy, totals = speculation.policy, speculation.totals
    rate = totals.acceptance_rate
    if rate is None or not totals.passes:
        return 1.0
    costs = replace(policy.costs(), draft_s=totals.draft_s / max(totals.drafted, 1))
    depth = totals.verified / totals.passes
    low = int(depth)
    yields = [expected_tokens([rate] * drafts) for drafts in (low, low + 1)]
    takes = [costs.turn_s(drafts) for drafts in (low, low + 1)]
    tokens, seconds = ((depth - low) * (more - less) + less for less, more in (yields, takes))
    plain = totals.plain_passes
    return (totals.passes * tokens + plain) * costs.plain_s / (totals.passes * seconds + plain * costs.plain_s)


def cases(engine: Engine, gguf: GGUFFile, options: argparse.Namespace) -> Iterator[Case]:
    """By synthetic acceptance, or of prompts by lookup."""
    if options.prompts is not None:
        for number, line in enumerate(options.prompts.read_text().splitlines()[: options.count]):
            ids = engine.prompt_ids(_text(json.loads(line)))[-options.prompt_tokens :]
            lookup = make_speculation(
                DraftOptions(NGRAM, options.most), gguf, engine.text, engine.plan, engine.executor
            )
            assert lookup is not None
            yield compare(engine, f"lookup, prompt {number}", lookup, ids, options.tokens, options.rounds)
        return
    ids = np.random.default_rng(1).integers(0, engine.tokenizer.vocab_size, options.prompt_tokens).tolist()
    for acceptance, tree in product(options.acceptance, options.tree):
        wanted = DraftOptions(options.draft or OFF, options.most, synthetic=acceptance, tree=tree)
        if options.simulated_step_ms is None:
            made = make_speculation(wanted, gguf, engine.text, engine.plan, engine.executor)
            assert made is not None
        else:
            source = SyntheticSource(acceptance, step_s=options.simulated_step_ms / 1e3)
            made = Speculation(engine.executor, source, new_policy(wanted, gguf, engine.plan, None))
        name = f"{made.source.name}, {f'trees up to {tree}' if tree else 'chains'}"
        yield compare(engine, name, made, ids, options.tokens, options.rounds)
        made.close()


def _text(record: dict[str, object]) -> str:
    turns = record.get("turns")
    return str(turns[0]) if isinstance(turns, list) else str(record.get("prompt", record))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--draft")
    parser.add_argument("--acceptance", type=float, nargs="*", default=[0.5, 0.7, 0.9])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--most", type=int, default=8)
    parser.add_argument("--tree", type=int, nargs="*", default=[32], help="Most drafts of a tree; 0: chains alone.")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--simulated-step-ms", type=float)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--budget", help="As for `strata run`: ram=2GiB makes weights stream.")
    options = parser.parse_args()
    from planner.budget import parse_budget  # noqa: PLC0415

    budget = parse_budget(options.budget) if options.budget else None
    context = options.prompt_tokens + options.tokens + 8
    with (
        GGUFFile.open(options.model) as gguf,
        planned_threads(),
        Engine(options.model, context_tokens=context, threads=options.threads, budget=budget) as engine,
    ):
        rows = []
        for case in cases(engine, gguf, options):
            print(json.dumps(asdict(case)), flush=True)
            rows.append(case)
    print("| drafts | plain | drafted | gain | over model | over plan | accepted | tokens a pass | same text |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---|")
    for case in rows:
        over_plan = f"{case.gain / case.planned_gain:.2f}" if case.planned_gain else ""
        accepted = "" if case.acceptance_rate is None else f"{case.acceptance_rate:.0%}"
        print(
            f"| {case.name} | {case.plain_tokens_per_s:.2f} | {case.drafted_tokens_per_s:.2f} | "
            f"{case.gain:.2f} | {case.over_model:.2f} | {over_plan} | "
            f"{accepted} | {case.tokens_per_pass or 0:.2f} | {'yes' if case.same_text else 'NO'} |"
        )


if __name__ == "__main__":
    main()
