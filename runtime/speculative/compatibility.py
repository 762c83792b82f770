"""Whether a draft's vocabulary is the target's: token by token, with the differences named.

Knows nothing about models. Drafts of another vocabulary could not make an answer wrong, but would never be right.
"""

from dataclasses import dataclass

from offload.errors import RequestError
from runtime.tokenizer import Tokenizer

MOST_NAMED = 3
LEAST_SHARED = 0.9  # of the target's tokens that the draft must have


@dataclass(frozen=True, slots=True)
class VocabularyMatch:
    """Tokens that both have under one id, special ones that differ, and those that only one of them has."""

    shared: int
    special_differences: tuple[int, ...]
    only_target: int
    only_draft: int

    def describe(self) -> str | None:
        """What differs, harmless as it is; None for equal vocabularies."""
        parts = []
        if self.special_differences:
            parts.append(f"{len(self.special_differences)} special tokens differ")
        if self.only_target:
            parts.append(f"{self.only_target} are missing in the draft")
        if self.only_draft:
            parts.append(f"{self.only_draft} are in the draft alone")
        return f"{self.shared} tokens are shared; {', '.join(parts)}" if parts else None


def match(target: Tokenizer, draft: Tokenizer, *, target_name: str, draft_name: str) -> VocabularyMatch:
    """How the vocabularies agree; RequestError where the draft's is another one.

    Special tokens may differ, and either may have more tokens at its end, as padded vocabularies do.
    """
    common = min(target.vocab_size, draft.vocab_size)
    different = [index for index in range(common) if target.token_text(index) != draft.token_text(index)]
    special = tuple(index for index in different if target.is_special(index) or draft.is_special(index))
    wrong = [index for index in different if index not in set(special)]
    if wrong:
        named = "; ".join(
            f"{index} is {target.token_text(index)!r} there and {draft.token_text(index)!r} in the draft"
            for index in wrong[:MOST_NAMED]
        )
        more = f", and {len(wrong) - MOST_NAMED} more" if len(wrong) > MOST_NAMED else ""
        raise RequestError(
            f"{draft_name} cannot draft for {target_name}: {len(wrong)} of {common} tokens differ: {named}{more}",
            hint="a draft must have the target's vocabulary; --draft ngram needs none",
        )
    if common - len(special) < LEAST_SHARED * target.vocab_size:
        raise RequestError(
            f"{draft_name} cannot draft for {target_name}: it has {draft.vocab_size} tokens, "
            f"of which {common - len(special)} are among the target's {target.vocab_size}",
            hint="a draft must have the target's vocabulary; --draft ngram needs none",
        )
    return VocabularyMatch(common - len(special), special, target.vocab_size - common, draft.vocab_size - common)
