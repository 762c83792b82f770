"""Which tokens end a generation, which are control tokens whatever the file calls them, and where a text holds them.

Many files leave these out or mark them wrongly, so llama.cpp goes by the tokens' names; the names and rules here are
those of its `llama_vocab`, so that both stop at the same token and cut a text at the same places. Knows nothing of how
the text between special tokens is tokenised.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from offload.gguf import GGUFFile
from runtime.tokenizer.vocabulary import SPECIAL, TokenKind, Vocabulary

END_OF_GENERATION: Final = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<｜end▁of▁sentence｜>",
    "<end_of_utterance>",
    "<|eom_id|>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "</s>",
    "[EOS]",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "[e~[",
)
FILL_IN_MIDDLE: Final = {
    "pre": (
        "<|fim_prefix|>",
        "<fim-prefix>",
        "<fim_prefix>",
        "<｜fim▁begin｜>",
        "<PRE>",
        "▁<PRE>",
        "<|code_prefix|>",
        "<|prefix|>",
    ),
    "suf": (
        "<|fim_suffix|>",
        "<fim-suffix>",
        "<fim_suffix>",
        "<｜fim▁hole｜>",
        "<SUF>",
        "▁<SUF>",
        "<|code_suffix|>",
        "<|suffix|>",
    ),
    "mid": (
        "<|fim_middle|>",
        "<fim-middle>",
        "<fim_middle>",
        "<｜fim▁end｜>",
        "<MID>",
        "▁<MID>",
        "<|code_middle|>",
        "<|middle|>",
    ),
    "pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "sep": ("<|file_sep|>",),
}
ALWAYS_TEXT: Final = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")
"""Tokens of the harmony format that are part of the text for whoever reads it."""

_WHITESPACE: Final = " \t\n\v\f\r"


def end_of_generation(vocabulary: Vocabulary) -> tuple[frozenset[int], NDArray[np.uint8]]:
    """The ids that end an answer, and the token kinds (tokens,) as they are once names have been looked at."""
    ids, kinds = vocabulary.ids, vocabulary.kinds.copy()
    fim_ids = dict(vocabulary.fim_ids)
    for role, names in FILL_IN_MIDDLE.items():
        found = sorted(ids[name] for name in names if name in ids)
        if role not in fim_ids and found:
            fim_ids[role] = found[0]
            kinds[found[0]] |= np.uint8(TokenKind.CONTROL)
    named = [ids[name] for name in END_OF_GENERATION if name in ids]
    kinds[named] |= np.uint8(TokenKind.CONTROL)
    kinds[[ids[name] for name in ALWAYS_TEXT if name in ids]] = TokenKind.USER_DEFINED
    ends = {*named, *(fim_ids[role] for role in ("pad", "rep", "sep") if role in fim_ids)}
    ends |= {end for end in (vocabulary.eos_id, vocabulary.eot_id, vocabulary.eom_id) if end is not None}
    texts = {vocabulary.tokens[end] for end in ends}
    if "<|end|>" in texts and texts & {"<|call|>", "<|calls|>"} and texts & {"<|return|>", "<|flush|>"}:
        ends.remove(ids["<|end|>"])  # there it closes a message, not the answer
        kinds[ids["<|end|>"]] = TokenKind.USER_DEFINED
    if "</s>" in texts and texts & {"<|tool_response>", "<|plamo:eos|>"}:
        ends.remove(ids["</s>"])  # there it is a tag of HTML
        kinds[ids["</s>"]] = TokenKind.NORMAL
    return frozenset(ends), kinds


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """A token that is found in a text as a whole, with the whitespace it swallows at its left or right."""

    text: str
    token_id: int
    is_control: bool
    strips_left: bool = False
    strips_right: bool = False


def special_tokens(gguf: GGUFFile, vocabulary: Vocabulary, kinds: NDArray[np.uint8]) -> tuple[SpecialToken, ...]:
    """The control, unknown and user-defined tokens, longest first: the order in which they are looked for."""
    found = np.flatnonzero(kinds & (SPECIAL | TokenKind.USER_DEFINED)).tolist()
    found.sort(key=lambda token_id: -len(vocabulary.tokens[token_id].encode()))
    left, right = _strips(gguf, [vocabulary.tokens[token_id] for token_id in found])
    return tuple(
        SpecialToken(text, token_id, bool(kinds[token_id] & SPECIAL), text in left, text in right)
        for token_id in found
        for text in (vocabulary.tokens[token_id],)
    )


def _strips(gguf: GGUFFile, texts: Sequence[str]) -> tuple[set[str], set[str]]:
    """Special tokens that swallow whitespace at their left and right: the file does not say, the model's name does."""
    pre = gguf.get_str("tokenizer.ggml.pre", "")
    architecture = gguf.get_str("general.architecture", "")
    name = gguf.get_str("general.name", "").lower()
    if any(part in pre for part in ("jina-v2-de", "jina-v2-es", "jina-v2-code")) or any(
        part in architecture for part in ("nomic-bert-moe", "jina-bert-v3")
    ):
        return {"<mask>"}, set()
    if "phi-3" in name or "phi3" in name:
        return set(), {*texts} - {"<unk>", "<s>", "<|endoftext|>"}
    return ({"[MASK]"} if "modern-bert" in name else set()), set()


def partition(text: str, tokens: Sequence[SpecialToken], *, parse_special: bool) -> list[str | int]:
    """Cuts `text` at special tokens: plain text as `str`, tokens as ids. Control tokens count with `parse_special`."""
    fragments: list[str | int] = [text] if text else []
    for token in tokens:
        if token.text not in text or (token.is_control and not parse_special):
            continue
        cut: list[str | int] = []
        for fragment in fragments:
            if isinstance(fragment, int):
                cut.append(fragment)
            else:
                _cut(fragment, token, cut)
        fragments = cut
    return fragments


def _cut(fragment: str, token: SpecialToken, into: list[str | int]) -> None:
    """Appends the parts of `fragment` around each occurrence of `token`, and the token's id between them."""
    rest = fragment
    while (start := rest.find(token.text)) >= 0:
        before, rest = rest[:start], rest[start + len(token.text) :]
        if token.strips_left:
            before = before.rstrip(_WHITESPACE)
        if token.strips_right:
            rest = rest.lstrip(_WHITESPACE)
        if before:
            into.append(before)
        into.append(token.token_id)
    if rest:
        into.append(rest)
