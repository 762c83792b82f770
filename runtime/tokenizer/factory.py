"""Which algorithm a GGUF file's vocabulary is for, by `tokenizer.ggml.model`.

Knows nothing about special tokens or text. The one place that names the tokenizer models this version knows.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from offload.errors import UnsupportedModelError
from offload.gguf import GGUFFile
from runtime.tokenizer.base import Algorithm
from runtime.tokenizer.bpe import ByteLevelBPE, PlainBPE, pre_name
from runtime.tokenizer.pretokenizers import PRE_TOKENIZERS
from runtime.tokenizer.sentencepiece import SentencePieceBPE
from runtime.tokenizer.unigram import Unigram
from runtime.tokenizer.vocabulary import Defaults, Vocabulary, read_vocabulary
from runtime.tokenizer.wordpiece import WordPiece

MODEL_KEY: Final = "tokenizer.ggml.model"
logger = logging.getLogger("strata.tokenizer")

Loaded = tuple[Vocabulary, Algorithm]


def _load_bpe(gguf: GGUFFile, name: str) -> Loaded:
    if not name:
        logger.warning(
            "%s names no pre-tokenizer (tokenizer.ggml.pre); using 'default', which may cut text wrongly", gguf.path
        )
    rules = PRE_TOKENIZERS.get(name or "default")
    if rules is None:
        raise UnsupportedModelError(
            f"{gguf.path}: pre-tokenizer {name!r} (tokenizer.ggml.pre) is not supported",
            hint=f"supported are {', '.join(sorted(PRE_TOKENIZERS))}",
        )
    vocabulary = read_vocabulary(gguf, Defaults(add_bos=rules.add_bos))
    if rules.newline_tokens:  # Gemma 4 files say no, and mean yes
        vocabulary = replace(vocabulary, add_bos=True)
    algorithm = ByteLevelBPE if rules.byte_level else PlainBPE
    return vocabulary, algorithm(gguf, vocabulary, rules)


def _load_gpt2(gguf: GGUFFile) -> Loaded:
    return _load_bpe(gguf, pre_name(gguf))


def _load_gemma4(gguf: GGUFFile) -> Loaded:
    return _load_bpe(gguf, "gemma4")


def _load_sentencepiece(gguf: GGUFFile) -> Loaded:
    defaults = Defaults(bos_id=1, eos_id=2, unk_id=0, add_bos=True, add_space_prefix=True)
    vocabulary = read_vocabulary(gguf, defaults)
    return vocabulary, SentencePieceBPE(vocabulary)


def _load_wordpiece(gguf: GGUFFile) -> Loaded:
    vocabulary = read_vocabulary(gguf, Defaults(bos_id=101, unk_id=100, sep_id=102))
    vocabulary = replace(vocabulary, add_bos=True, add_eos=True, closing_id=vocabulary.sep_id)  # whatever the file says
    return vocabulary, WordPiece(gguf, vocabulary)


def _load_unigram(gguf: GGUFFile) -> Loaded:
    vocabulary = read_vocabulary(gguf, Defaults(eos_id=1, unk_id=2, add_eos=True))
    return vocabulary, Unigram(gguf, vocabulary)


MODELS: Final[Mapping[str, Callable[[GGUFFile], Loaded]]] = {
    "gpt2": _load_gpt2,
    "llama": _load_sentencepiece,
    "gemma4": _load_gemma4,
    "bert": _load_wordpiece,
    "t5": _load_unigram,
}


def load(gguf: GGUFFile) -> Loaded:
    """The vocabulary and its algorithm; UnsupportedModelError for a tokenizer model that is not known."""
    model = gguf.get_str(MODEL_KEY)
    if model not in MODELS:
        raise UnsupportedModelError(
            f"{gguf.path}: tokenizer model {model!r} ({MODEL_KEY}) is not supported",
            hint=f"supported are {', '.join(MODELS)}",
        )
    return MODELS[model](gguf)
