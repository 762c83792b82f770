"""Which drafts a user allows for a model: the one that is named, or those that are known for it.

Known are the built-in draft for the built-in model, and smaller GGUF files with its vocabulary in its own folder. Reads
headers and vocabularies alone; knows nothing about what drafts bring.
"""

import logging
from pathlib import Path

from offload.errors import RequestError, StrataError
from offload.gguf import GGUFFile
from planner.draft_choice import AllowedDraft, DraftWish
from planner.model_shape import ModelShape
from planner.question import Wish, planned_model
from runtime.models import DEMO_DRAFT, DEMO_MODEL
from runtime.speculative.compatibility import match
from runtime.speculative.head_weights import SUFFIX, HeadWeights
from runtime.speculative.options import AUTO, NGRAM, DraftOptions
from runtime.tokenizer import Tokenizer

log = logging.getLogger("strata.speculative")

SMALLER = 0.5  # of the model's file: a draft that is larger is hardly quicker
MOST_FILES = 8  # of a folder whose headers are read, from the smallest on


def draft_wish(options: DraftOptions, gguf: GGUFFile, tokenizer: Tokenizer) -> DraftWish | None:
    """What `options` allow beside the model of `gguf`; None where drafts are off.

    RequestError for a file that is none or has another vocabulary, ModelFormatError for one that cannot be read.
    """
    if not options.is_on:
        return None
    return DraftWish(
        sources=_sources(options, gguf, tokenizer),
        looks_up=bool({AUTO, NGRAM} & set(options.words)),
        most=options.most,
        is_named=bool(options.files),
        is_forced=options.forced or options.synthetic is not None,
        acceptance=options.synthetic,
    )


def allowed_draft(path: Path, gguf: GGUFFile, tokenizer: Tokenizer) -> AllowedDraft:
    """The draft at `path` for that model; RequestError for another vocabulary, ModelFormatError for what is none."""
    if path.suffix == SUFFIX:
        return AllowedDraft(path.name, str(path), head_bytes=HeadWeights.load(path).num_bytes)
    with GGUFFile.open(path) as draft:
        found = match(tokenizer, Tokenizer.from_gguf(draft), target_name=gguf.path.name, draft_name=path.name)
        if (note := found.describe()) is not None:
            log.info("%s: %s", path.name, note)
        shape = ModelShape.from_gguf(draft, Wish().kv)
        return AllowedDraft(path.name, str(path), planned_model(draft, shape), shape)


def _sources(options: DraftOptions, gguf: GGUFFile, tokenizer: Tokenizer) -> tuple[AllowedDraft, ...]:
    if len(options.files) > 1:
        raise RequestError(f"--draft names {len(options.files)} files", hint="give one, or one and ngram")
    if options.files:
        path = Path(options.files[0])
        if not path.is_file():
            raise RequestError(f"there is no draft {path}", hint="give the path of a GGUF file, auto, ngram or off")
        return (allowed_draft(path, gguf, tokenizer),)
    return tuple(_known(gguf, tokenizer)) if AUTO in options.words else ()


def _known(gguf: GGUFFile, tokenizer: Tokenizer) -> list[AllowedDraft]:
    """The built-in draft, or the smaller models beside the file that have its vocabulary."""
    path = Path(str(gguf.path))
    if not path.is_file():  # it lies on a server
        return []
    if path.resolve() == DEMO_MODEL:
        return [allowed_draft(DEMO_DRAFT, gguf, tokenizer)]
    sizes = [(other.stat().st_size, other) for other in path.parent.glob("*.gguf") if other.is_file()]
    found = []
    for _, other in sorted(pair for pair in sizes if pair[0] <= SMALLER * gguf.byte_size)[:MOST_FILES]:
        try:
            found.append(allowed_draft(other, gguf, tokenizer))
        except StrataError as error:  # a file of the folder that is no draft for this model
            log.debug("%s is no draft for %s: %s", other.name, path.name, error)
    return found
