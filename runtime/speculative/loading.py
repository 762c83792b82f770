"""From what a user asks for to a source of drafts: files opened, vocabularies compared, the small plan made, loaded.

Knows nothing of sequences. A draft model is planned within what the target's plan leaves of the budget.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from offload.closing import closed_on_error
from offload.errors import RequestError, StrataError
from offload.gguf import GGUFFile
from planner.drafts import DRAFT_CONTEXT_TOKENS, DraftForecast, draft_bytes, forecast, left_over
from planner.gpu_choice import FOUND, gpu_text
from planner.model_shape import ModelShape
from planner.plan import Plan
from planner.profile import load_or_measure
from planner.solve import plan_here
from planner.ways import PROGRAM
from runtime.backend import make_executor
from runtime.models import DEMO_DRAFT, DEMO_MODEL
from runtime.speculative.compatibility import match
from runtime.speculative.draft import DraftSource
from runtime.speculative.feature_head import SUFFIX, HeadSource
from runtime.speculative.mixed import MixedSource
from runtime.speculative.model_draft import ModelSource
from runtime.speculative.ngram import NGramSource
from runtime.speculative.options import AUTO, NGRAM, DraftOptions
from runtime.speculative.synthetic import SyntheticSource
from runtime.tokenizer import Tokenizer

log = logging.getLogger("strata.speculative")


@dataclass(frozen=True, slots=True)
class LoadedDraft:
    """A source, and what is expected of it where it is a model."""

    source: DraftSource
    forecast: DraftForecast | None = None


def load_draft(options: DraftOptions, gguf: GGUFFile, tokenizer: Tokenizer, plan: Plan) -> LoadedDraft:
    """The source that `options` ask for beside the model of `gguf`, which runs by `plan`.

    RequestError for a file that is none or has another vocabulary, DoesNotFitError where the budget leaves no room;
    with "auto" neither: then there is lookup alone.
    """
    path = _file_of(options, gguf)
    model: LoadedDraft | None = None
    try:
        if path is not None:
            model = _load_model(path, gguf, tokenizer, plan, options.reserved_bytes)
    except StrataError as error:
        if AUTO not in options.words:
            raise
        log.warning("drafts by lookup alone: %s", error)
    if options.synthetic is not None:
        source = SyntheticSource(options.synthetic, None if model is None else model.source)
        return LoadedDraft(source, None if model is None else model.forecast)
    if model is None:
        return LoadedDraft(NGramSource())
    if not {AUTO, NGRAM} & set(options.words):
        return model
    return LoadedDraft(MixedSource(NGramSource(), model.source), model.forecast)


def draft_ram_bytes(options: DraftOptions, gguf: GGUFFile, context_tokens: int | None) -> int:
    """RAM to set aside for the draft model, if there is one, before the plan of the model of `gguf` is made."""
    path = _file_of(options, gguf)
    if path is None or path.suffix == SUFFIX:
        return 0
    with GGUFFile.open(path) as draft:
        shape = ModelShape.from_gguf(draft)
        context = min(context_tokens or DRAFT_CONTEXT_TOKENS, shape.context_length)
        return draft_bytes(shape, context)


def _file_of(options: DraftOptions, gguf: GGUFFile) -> Path | None:
    """The draft model's file: the one that is named, or the one that comes with a model; RequestError for no file."""
    if len(options.files) > 1:
        raise RequestError(f"--draft names {len(options.files)} files", hint="give one, or one and ngram")
    if options.files:
        path = Path(options.files[0])
        if not path.is_file():
            raise RequestError(f"there is no draft {path}", hint="give the path of a GGUF file, auto, ngram or off")
        return path
    is_demo = AUTO in options.words and Path(str(gguf.path)).resolve() == DEMO_MODEL
    return DEMO_DRAFT if is_demo else None


def _load_model(path: Path, gguf: GGUFFile, tokenizer: Tokenizer, plan: Plan, reserved_bytes: int) -> LoadedDraft:
    """A draft model, or a head on the target's hidden states, beside a target."""
    if path.suffix == SUFFIX:
        if plan.settings.loop != PROGRAM:
            raise RequestError(
                f"{path.name} needs the target's hidden states, which the {plan.settings.loop} loop does not show",
                hint="use --loop program, or another draft",
            )
        target = ModelShape.from_gguf(gguf)
        return LoadedDraft(HeadSource(path, width=target.embedding_length, vocab_size=tokenizer.vocab_size))
    draft = GGUFFile.open(path)
    with closed_on_error(draft):
        draft_tokenizer = Tokenizer.from_gguf(draft)
        found = match(tokenizer, draft_tokenizer, target_name=gguf.path.name, draft_name=path.name)
        if (note := found.describe()) is not None:
            log.info("%s: %s", path.name, note)
        own = _own_plan(draft, plan, reserved_bytes)
        shapes = ModelShape.from_gguf(gguf, plan.settings.kv), ModelShape.from_gguf(draft)
        foreseen = forecast(plan, shapes[0], own, shapes[1], load_or_measure())
        executor = make_executor(draft, own, on_load=None)
    source = ModelSource(
        executor,
        draft,
        vocab_size=draft_tokenizer.vocab_size,
        context_tokens=own.settings.context_tokens,
        has_own_device=own.settings.device != "cpu" == plan.settings.device,
    )
    return LoadedDraft(source, foreseen)


def _own_plan(draft: GGUFFile, plan: Plan, reserved_bytes: int) -> Plan:
    """The draft's small plan, in what the target's leaves; its context may be shorter than the target's."""
    context = min(plan.settings.context_tokens, DRAFT_CONTEXT_TOKENS, ModelShape.from_gguf(draft).context_length)
    budget = left_over(plan, reserved_bytes)
    device = plan.settings.device
    gpu = gpu_text(device) if device != "cpu" or not budget.gpu_bytes else FOUND
    return plan_here(draft, context_tokens=context, threads=plan.settings.threads, budget=budget, gpu=gpu)
