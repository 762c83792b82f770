"""From the draft that a plan chose to a source of drafts: opened, given its small plan, loaded.

Knows nothing of sequences, nor of how a draft is chosen. Where a plan was made without a thought of drafts, one is
chosen within what it leaves of the budget.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from offload.closing import closed_on_error
from offload.errors import RequestError
from offload.gguf import GGUFFile
from planner.draft_choice import own_plan, with_draft
from planner.gpu_choice import FOUND, chosen_gpu, gpu_text
from planner.model_shape import ModelShape
from planner.plan import Plan
from planner.planned_draft import DraftKind, PlannedDraft
from planner.profile import load_or_measure
from planner.question import Here
from planner.solve import question_of
from planner.ways import PROGRAM
from runtime.backend import make_executor
from runtime.executor.base import Executor, FeatureExecutor
from runtime.speculative.draft import DraftSource
from runtime.speculative.feature_head import HeadSource
from runtime.speculative.known import allowed_draft, draft_wish
from runtime.speculative.mixed import MixedSource
from runtime.speculative.model_draft import ModelSource
from runtime.speculative.ngram import NGramSource
from runtime.speculative.options import DraftOptions
from runtime.speculative.synthetic import SyntheticSource
from runtime.tokenizer import Tokenizer

log = logging.getLogger("strata.speculative")


@dataclass(frozen=True, slots=True)
class LoadedDraft:
    """A source, and what is planned of it; `key` names its model or head in the profile, which learns of it."""

    source: DraftSource
    planned: PlannedDraft | None = None
    key: str | None = None


def load_draft(
    options: DraftOptions, gguf: GGUFFile, tokenizer: Tokenizer, plan: Plan, executor: Executor
) -> LoadedDraft | None:
    """The source that `plan` chose beside the model of `gguf`, which `executor` runs, or that `options` ask for now.

    None where none is worth it. RequestError for a file that is none or has another vocabulary.
    """
    planned = plan.draft or _chosen_now(options, gguf, tokenizer, plan)
    model = None
    if planned is not None and planned.path is not None:
        model = _load_model(planned, gguf, tokenizer, plan, executor)
    if options.synthetic is not None:
        return LoadedDraft(SyntheticSource(options.synthetic, None if model is None else model.source), planned)
    if planned is None:
        return None
    if model is None:
        return LoadedDraft(NGramSource(), planned) if planned.looks_up else None
    return replace(model, source=MixedSource(NGramSource(), model.source)) if planned.looks_up else model


def _chosen_now(options: DraftOptions, gguf: GGUFFile, tokenizer: Tokenizer, plan: Plan) -> PlannedDraft | None:
    """The draft that is best within what the plan leaves; a warning where a model that is allowed is not."""
    wish = draft_wish(options, gguf, tokenizer)
    if wish is None:
        return None
    question = question_of(plan, gguf)
    if plan.settings.device == "cpu" and plan.budget.gpu_bytes:
        question = replace(question, place=Here(load_or_measure(), chosen_gpu(FOUND)))
    found = with_draft(question, plan, wish, fixed=True)
    if found.draft is not None and found.draft.kind is DraftKind.NONE:
        log.warning("draft: %s", found.draft.lines()[0])
    for note in found.notes[len(plan.notes) :]:
        log.warning("%s", note)
    return found.draft


def _load_model(
    planned: PlannedDraft, gguf: GGUFFile, tokenizer: Tokenizer, plan: Plan, executor: Executor
) -> LoadedDraft:
    """A draft model, or a head on the target's hidden states, beside a target."""
    assert planned.path is not None, "it is a file"
    path = Path(planned.path)
    allowed = allowed_draft(path, gguf, tokenizer)
    if planned.kind is DraftKind.HEAD:
        if plan.settings.loop != PROGRAM or not isinstance(executor, FeatureExecutor):
            raise RequestError(
                f"{path.name} needs the target's hidden states, which the {plan.settings.loop} loop does not show",
                hint="use --loop program, or another draft",
            )
        width = ModelShape.from_gguf(gguf).embedding_length
        source = HeadSource(path, executor, width=width, vocab_size=tokenizer.vocab_size)
        return LoadedDraft(source, planned, allowed.key)
    own = own_plan(allowed, planned, plan, Here(load_or_measure(), chosen_gpu(gpu_text(planned.device))))
    draft = GGUFFile.open(path)
    with closed_on_error(draft):
        vocab_size = Tokenizer.from_gguf(draft).vocab_size
        made = make_executor(draft, own, on_load=None)
    model = ModelSource(
        made,
        draft,
        vocab_size=vocab_size,
        context_tokens=own.settings.context_tokens,
        has_own_device=own.settings.device != "cpu" == plan.settings.device,
    )
    return LoadedDraft(model, planned, allowed.key)
