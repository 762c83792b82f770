"""How byte-pair encoders cut a text into words before merging: a table by the name in `tokenizer.ggml.pre`.

The patterns are facts of the published tokenizers, in the form llama.cpp gives them, written for Oniguruma (the engine
of the `tokenizers` library). They apply one after the other, each to the pieces the last one left; both what a pattern
matches and what lies between matches are pieces. Knows nothing about vocabularies.

Where llama.cpp differs from the published pattern, llama.cpp is followed: its classes of upper- and lowercase letters
hold all letters, and whitespace outside of ASCII matches no written-out range.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

from runtime.tokenizer.character_classes import ASIAN, HAN, LATIN_GREEK_CYRILLIC

Behavior = Literal["isolated", "merged_with_previous"]


@dataclass(frozen=True, slots=True)
class Split:
    """One pattern; with `merged_with_previous` a match is joined to the text in front of it."""

    pattern: str
    behavior: Behavior = "isolated"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """`splits` in order. `ignore_merges`: a word that is a token is that token, whatever the merges would give.

    `byte_level`: words are spelled in GPT-2's byte alphabet; otherwise in UTF-8, and with `escape_spaces` spaces
    are written as U+2581. `newline_tokens`: a run of newlines that is a token is that token.
    """

    splits: tuple[Split, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    byte_level: bool = True
    escape_spaces: bool = False
    newline_tokens: bool = False


_CONTRACTION = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"\s+(?!\S)|\s+"
_LINES = r"\s*[\r\n]+|" + _SPACES
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+"
_PUNCTUATED_WORD = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
_MARKED_WORD = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
_CJK_WORD = r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+"
_CJK_RUN = r"[\x{800}-\x{9FA5}\x{AC00}-\x{D7FF}&&\S]+"
_LETTER = r"\p{L}"
_LETTER_OR_MARK = r"[\p{L}\p{M}]"
# groups of three counted from the right; as in llama.cpp the first one keeps what stands before the number
_DIGITS_FROM_RIGHT = Split(r"\p{N}{1,3}(?=(?:\p{N}{3})*+(?!\p{N}))", "merged_with_previous")


def _cased_word(letters: str, ending: str = "") -> str:
    """A word that is cut before an uppercase ASCII letter which follows lowercase ones."""
    start = r"[^\r\n\p{L}\p{N}]?"
    not_lower, not_upper = rf"(?:(?={letters})[^a-z])", rf"(?:(?={letters})[^A-Z])"
    optional = f"{ending}?" if ending else ""
    return f"{start}{not_lower}*{not_upper}+{optional}|{start}{not_lower}+{not_upper}*{optional}"


def _plain(*patterns: str) -> PreTokenizer:
    return PreTokenizer(tuple(Split(pattern) for pattern in patterns))


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|" + _SPACES
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}[\r\n]*|{_LINES}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_SYMBOLS}[\r\n]*|{_LINES}"
_DEEPSEEK3 = rf"{_PUNCTUATED_WORD}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_LINES}"
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_NEWLINES = r"[^\n]+|[\n]+"

_FAMILIES: Final[Mapping[str, PreTokenizer]] = {
    "default": _plain(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert jina-v1-en jina-v2-code "
    "roberta-bpe mpt olmo jais trillion granite-docling exaone4": _plain(_GPT2),
    "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2": _plain(r"\p{N}", _GPT2),
    "falcon": _plain(r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"),
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": replace(
        _plain(_LLAMA3), ignore_merges=True, add_bos=True
    ),
    "dbrx smaug-bpe chatglm-bpe": _plain(_LLAMA3),
    "glm4 glm5": replace(_plain(_LLAMA3), ignore_merges=True),
    "jais-2": _plain(
        rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}[\r\n]*|\s*[\r\n]+|"
        + "".join(rf"\s{{{length}}}(?!\S)|" for length in (512, 256, 128, 64, 32, 16, 8, 4))
        + r"\s{1,2}(?!\S)|\s"
    ),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2": _plain(_QWEN2),
    "qwen35": _plain(rf"{_CONTRACTION}|{_MARKED_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_LINES}"),
    "ufakzeka": _plain(rf"{_WORD}|\p{{N}}|{_SYMBOLS}[\r\n]*|{_LINES}"),
    "laguna": _plain(_NEWLINES, _QWEN2),
    "seed-coder": _plain(rf"{_CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_LINES}"),
    "minicpm5": replace(
        _plain(r"\p{N}{1,3}", rf"{_CONTRACTION}|{_WORD}|\p{{N}}+|{_SYMBOLS}[\r\n]*|{_LINES}"), ignore_merges=True
    ),
    "bailingmoe bailingmoe2 llada-moe": _plain(
        r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])"
        rf"|{_WORD}|\p{{N}}|{_SYMBOLS}[\r\n]*|\s*[\r\n]|{_SPACES}"
    ),
    "exaone-moe": _plain(
        rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+"
        rf"|\p{{N}}|{_SYMBOLS}[\r\n/]?|\s*[\r\n]|{_SPACES}"
    ),
    "deepseek-llm": _plain(
        r"[\r\n]",
        rf"\s?[{LATIN_GREEK_CYRILLIC}]+",
        r"\s?[!-/:-~！-／：-～\x{2018}-\x{201F}\x{3001}\x{3002}]+",
        r"\s+\z",
        _CJK_RUN,
        r"\p{N}+",
    ),
    "deepseek-coder": _plain(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_RUN, r"\p{N}"),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": _plain(r"\p{N}{1,3}", _CJK_WORD, _DEEPSEEK3),
    "spark2_5": _plain(r"\p{N}{1,3}", _CJK_WORD, rf"{_PUNCTUATED_WORD}| ?[\p{{P}}\p{{S}}]+|[\r\n]|{_SPACES}", r"\p{N}"),
    "youtu": replace(
        _plain(
            r"[\x{AC00}-\x{D7A3}\x{3131}-\x{318E}]+|[！…“”‘’—：；，\x{3001}-\x{303F}\x{FE30}-\x{FE4F}]+"
            r"|[\x{3105}-\x{312F}]+|" + _CJK_WORD,
            rf"{_MARKED_WORD}{_CONTRACTION}?|\p{{N}}|{_SYMBOLS}[\r\n/]*|{_LINES}",
        ),
        ignore_merges=True,
    ),
    "kimi-k2": _plain(
        rf"[{HAN}]+|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}&&[^{HAN}]]+{_CONTRACTION}?"
        rf"|\p{{N}}{{1,3}}|{_SYMBOLS}[\r\n]*|{_LINES}"
    ),
    "afmoe": PreTokenizer((_DIGITS_FROM_RIGHT, Split(rf"[{ASIAN}]+"), Split(_DEEPSEEK3))),
    "tiny_aya cohere2moe": PreTokenizer(
        (_DIGITS_FROM_RIGHT, Split(rf"{_MARKED_WORD}{_CONTRACTION}?|\p{{N}}{{1,3}}|{_SYMBOLS}[\r\n/]*|{_LINES}"))
    ),
    "superbpe": _plain(r"\p{N}+", r"(?=(?:[0-9]{3})++(?![0-9]))"),
    "poro-chat bloom gpt3-finnish": _plain(_BLOOM),
    "viking": _plain(_BLOOM, r"\p{N}"),
    "tekken": replace(
        _plain(rf"{_cased_word(_LETTER)}|\p{{N}}|{_SYMBOLS}[\r\n/]*|{_LINES}"), ignore_merges=True, add_bos=True
    ),
    "gpt-4o llama4 kanana2 talkie minimax-m2": _plain(
        rf"{_cased_word(_LETTER, _CONTRACTION)}|\p{{N}}{{1,3}}|{_SYMBOLS}[\r\n/]*|{_LINES}"
    ),
    "granite-embed-multi-97m": replace(
        _plain(rf"{_cased_word(_LETTER_OR_MARK, _CONTRACTION)}|\p{{N}}{{1,3}}|{_SYMBOLS}[\r\n/]*|{_LINES}"),
        ignore_merges=True,
    ),
    "chameleon": replace(
        _plain(
            r"<sentinel:[0-9]+>",
            r"IMGIMG[A-I]{1,4}Z",
            r"[\t\n]|    |  ",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
        ),
        add_bos=True,
    ),
    "gemma4 granite-embed-multi-311m": replace(
        _plain(_NEWLINES), add_bos=True, byte_level=False, escape_spaces=True, newline_tokens=True
    ),
    "sarvam-moe": replace(_plain(_NEWLINES), byte_level=False, escape_spaces=True),
    "whitespace": replace(_plain(r"\S+"), byte_level=False),
}

PRE_TOKENIZERS: Final[Mapping[str, PreTokenizer]] = {
    name: pre_tokenizer for names, pre_tokenizer in _FAMILIES.items() for name in names.split()
}
