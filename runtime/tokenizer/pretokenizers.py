"""How byte-pair encoders cut a text into words before merging: a table by the name in `tokenizer.ggml.pre`.

The patterns are facts of the published tokenizers, in the form llama.cpp gives them, written for Oniguruma (the engine
of the `tokenizers` library). They apply one after the other, each to the pieces the last one left; both what a pattern
matches and what lies between matches are pieces. Knows nothing about vocabularies.

Where llama.cpp differs from the published pattern, llama.cpp is followed: its classes of upper- and lowercase letters
hold all letters, and whitespace outside of ASCII matches no written-out range.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from offload.errors import UnsupportedModelError

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
_HAN = (
    r"\x{4E00}-\x{9FFF}\x{3400}-\x{4DBF}\x{F900}-\x{FAFF}\x{20000}-\x{2A6DF}\x{2A700}-\x{2B73F}"
    r"\x{2B740}-\x{2B81F}\x{2B820}-\x{2CEAF}\x{2CEB0}-\x{2EBEF}\x{2F800}-\x{2FA1F}"
)
_LETTER = r"\p{L}"
_LETTER_OR_MARK = r"[\p{L}\p{M}]"
_DIGITS_FROM_RIGHT = Split(r"\p{N}{1,3}(?=(?:\p{N}{3})*+(?!\p{N}))", "merged_with_previous")


def _cased_word(letters: str, ending: str = "") -> str:
    """A word that is cut before an uppercase ASCII letter which follows lowercase ones."""
    start = r"[^\r\n\p{L}\p{N}]?"
    not_lower, not_upper = rf"(?:(?={letters})[^a-z])", rf"(?:(?={letters})[^A-Z])"
    optional = f"{ending}?" if ending else ""
    return f"{start}{not_lower}*{not_upper}+{optional}|{start}{not_lower}+{not_upper}*{optional}"


def _isolated(*patterns: str) -> tuple[Split, ...]:
    return tuple(Split(pattern) for pattern in patterns)


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|" + _SPACES
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}[\r\n]*|{_LINES}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_SYMBOLS}[\r\n]*|{_LINES}"
_NEWLINES = r"[^\n]+|[\n]+"
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_CJK_WORD = r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+"
_CJK_RUN = r"[\x{800}-\x{9FA5}\x{AC00}-\x{D7FF}&&\S]+"
_LATIN_GREEK_CYRILLIC = (
    r"A-Za-z\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}\x{1BC}-\x{1BF}\x{1C4}-\x{293}\x{295}-\x{2AF}\x{370}-\x{373}"
    r"\x{376}\x{377}\x{37B}-\x{37D}\x{37F}\x{386}\x{388}-\x{38A}\x{38C}\x{38E}-\x{3A1}\x{3A3}-\x{3F5}\x{3F7}-\x{481}"
    r"\x{48A}-\x{52F}\x{531}-\x{556}\x{10A0}-\x{10C5}\x{13A0}-\x{13F5}\x{13F8}-\x{13FD}\x{1C90}-\x{1CBA}"
    r"\x{1CBD}-\x{1CBF}\x{1D00}-\x{1D2B}\x{1D6B}-\x{1D77}\x{1D79}-\x{1D9A}\x{1E00}-\x{1F15}\x{1F18}-\x{1F1D}"
    r"\x{1F20}-\x{1F45}\x{1F48}-\x{1F4D}\x{1F50}-\x{1F57}\x{1F59}\x{1F5B}\x{1F5D}\x{1F5F}-\x{1F7D}\x{1F80}-\x{1FB4}"
    r"\x{1FB6}-\x{1FBC}\x{1FBE}\x{1FC2}-\x{1FC4}\x{1FC6}-\x{1FCC}\x{1FD0}-\x{1FD3}\x{1FD6}-\x{1FDB}\x{1FE0}-\x{1FEC}"
    r"\x{1FF2}-\x{1FF4}\x{1FF6}-\x{1FFC}\x{2102}\x{2107}\x{210A}-\x{2113}\x{2115}\x{2119}-\x{211D}\x{2124}\x{2126}"
    r"\x{2128}\x{212A}-\x{212D}\x{212F}-\x{2134}\x{2139}\x{213C}-\x{213F}\x{2145}-\x{2149}\x{214E}\x{2183}\x{2184}"
    r"\x{2C00}-\x{2C7B}\x{2C7E}-\x{2CE4}\x{2CEB}-\x{2CEE}\x{2CF2}\x{2CF3}\x{A640}-\x{A66D}\x{A680}-\x{A69B}"
    r"\x{A722}-\x{A76F}\x{A771}-\x{A787}\x{A78B}-\x{A78E}\x{AB70}-\x{ABBF}\x{FB00}-\x{FB06}\x{FB13}-\x{FB17}"
    r"\x{FF21}-\x{FF3A}\x{FF41}-\x{FF5A}\x{10400}-\x{1044F}\x{104B0}-\x{104D3}\x{104D8}-\x{104FB}\x{10C80}-\x{10CB2}"
    r"\x{10CC0}-\x{10CF2}\x{118A0}-\x{118DF}\x{1E900}-\x{1E943}"
)
_ASIAN = (
    r"\x{4E00}-\x{9FFF}\x{3400}-\x{4DBF}\x{8C48}-\x{FAFF}\x{3040}-\x{309F}\x{30A0}-\x{30FF}\x{FF65}-\x{FF9F}"
    r"\x{2F00}-\x{2FDF}\x{E40}-\x{E7F}\x{E80}-\x{EFF}\x{1780}-\x{17FF}\x{1000}-\x{109F}\x{AA60}-\x{AA7F}"
    r"\x{A9E0}-\x{A9FF}\x{AC00}-\x{D7AF}\x{1100}-\x{11FF}"
)
_YOUTU_SCRIPTS = (
    r"[\x{AC00}-\x{D7A3}\x{3131}-\x{318E}]+|[！…“”‘’—：；，\x{3001}-\x{303F}\x{FE30}-\x{FE4F}]+"
    r"|[\x{3105}-\x{312F}]+|" + _CJK_WORD
)

_DEFAULT = PreTokenizer(_isolated(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))
_LLAMA3_PRE = PreTokenizer(_isolated(_LLAMA3), ignore_merges=True, add_bos=True)
_GPT2_PRE = PreTokenizer(_isolated(_GPT2))
_STARCODER_PRE = PreTokenizer(_isolated(r"\p{N}", _GPT2))
_QWEN2_PRE = PreTokenizer(_isolated(_QWEN2))
_DEEPSEEK3_PRE = PreTokenizer(
    _isolated(r"\p{N}{1,3}", _CJK_WORD, rf"{_PUNCTUATED_WORD}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_LINES}")
)
_BLOOM_PRE = PreTokenizer(_isolated(_BLOOM))
_GPT4O_PRE = PreTokenizer(
    _isolated(rf"{_cased_word(_LETTER, _CONTRACTION)}|\p{{N}}{{1,3}}|{_SYMBOLS}[\r\n/]*|{_LINES}")
)
_LLAMA3_SPLIT_PRE = PreTokenizer(_isolated(_LLAMA3))
_BAILING_PRE = PreTokenizer(
    _isolated(
        r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])"
        rf"|{_WORD}|\p{{N}}|{_SYMBOLS}[\r\n]*|\s*[\r\n]|{_SPACES}"
    )
)
_TINY_AYA_PRE = PreTokenizer(
    (
        _DIGITS_FROM_RIGHT,
        Split(rf"{_MARKED_WORD}{_CONTRACTION}?|\p{{N}}{{1,3}}|{_SYMBOLS}[\r\n/]*|{_LINES}"),
    )
)
_GEMMA4_PRE = PreTokenizer(
    _isolated(_NEWLINES), add_bos=True, byte_level=False, escape_spaces=True, newline_tokens=True
)

_FAMILIES: Final[tuple[tuple[PreTokenizer, str], ...]] = (
    (_DEFAULT, "default"),
    (_LLAMA3_PRE, "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano"),
    (_LLAMA3_SPLIT_PRE, "dbrx smaug-bpe chatglm-bpe"),
    (PreTokenizer(_isolated(_LLAMA3), ignore_merges=True), "glm4 glm5"),
    (
        PreTokenizer(
            _isolated(
                rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}[\r\n]*|\s*[\r\n]+|"
                + "".join(rf"\s{{{length}}}(?!\S)|" for length in (512, 256, 128, 64, 32, 16, 8, 4))
                + r"\s{1,2}(?!\S)|\s"
            )
        ),
        "jais-2",
    ),
    (
        PreTokenizer(
            _isolated(
                r"[\r\n]",
                rf"\s?[{_LATIN_GREEK_CYRILLIC}]+",
                r"\s?[!-/:-~！-／：-～\x{2018}-\x{201F}\x{3001}\x{3002}]+",
                r"\s+\z",
                _CJK_RUN,
                r"\p{N}+",
            )
        ),
        "deepseek-llm",
    ),
    (PreTokenizer(_isolated(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_RUN, r"\p{N}")), "deepseek-coder"),
    (_DEEPSEEK3_PRE, "deepseek-v3 hunyuan-dense joyai-llm hy_v4"),
    (
        PreTokenizer(
            _isolated(r"\p{N}{1,3}", _CJK_WORD, rf"{_PUNCTUATED_WORD}| ?[\p{{P}}\p{{S}}]+|[\r\n]|{_SPACES}", r"\p{N}")
        ),
        "spark2_5",
    ),
    (
        PreTokenizer(
            _isolated(_YOUTU_SCRIPTS, rf"{_MARKED_WORD}{_CONTRACTION}?|\p{{N}}|{_SYMBOLS}[\r\n/]*|{_LINES}"),
            ignore_merges=True,
        ),
        "youtu",
    ),
    (PreTokenizer(_isolated(r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")), "falcon"),
    (_STARCODER_PRE, "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2"),
    (
        _GPT2_PRE,
        "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert jina-v1-en "
        "jina-v2-code roberta-bpe mpt olmo jais trillion granite-docling exaone4",
    ),
    (_QWEN2_PRE, "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2"),
    (PreTokenizer(_isolated(rf"{_WORD}|\p{{N}}|{_SYMBOLS}[\r\n]*|{_LINES}")), "ufakzeka"),
    (
        PreTokenizer(
            _isolated(rf"{_CONTRACTION}|{_MARKED_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_LINES}")
        ),
        "qwen35",
    ),
    (_BLOOM_PRE, "poro-chat bloom gpt3-finnish"),
    (PreTokenizer(_isolated(_BLOOM, r"\p{N}")), "viking"),
    (
        PreTokenizer(
            _isolated(rf"{_cased_word(_LETTER)}|\p{{N}}|{_SYMBOLS}[\r\n/]*|{_LINES}"), ignore_merges=True, add_bos=True
        ),
        "tekken",
    ),
    (
        PreTokenizer(
            _isolated(
                r"<sentinel:[0-9]+>",
                r"IMGIMG[A-I]{1,4}Z",
                r"[\t\n]|    |  ",
                r"\p{N}",
                r"[\p{P}!-/:-@\[-`{-~]",
                _GPT2,
            ),
            add_bos=True,
        ),
        "chameleon",
    ),
    (_GPT4O_PRE, "gpt-4o llama4 kanana2 talkie minimax-m2"),
    (
        PreTokenizer(
            _isolated(rf"{_cased_word(_LETTER_OR_MARK, _CONTRACTION)}|\p{{N}}{{1,3}}|{_SYMBOLS}[\r\n/]*|{_LINES}"),
            ignore_merges=True,
        ),
        "granite-embed-multi-97m",
    ),
    (_TINY_AYA_PRE, "tiny_aya cohere2moe"),
    (
        PreTokenizer(
            _isolated(
                rf"[{_HAN}]+|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}&&[^{_HAN}]]+{_CONTRACTION}?"
                rf"|\p{{N}}{{1,3}}|{_SYMBOLS}[\r\n]*|{_LINES}"
            )
        ),
        "kimi-k2",
    ),
    (PreTokenizer(_isolated(r"\p{N}+", r"(?=(?:[0-9]{3})++(?![0-9]))")), "superbpe"),
    (_BAILING_PRE, "bailingmoe bailingmoe2 llada-moe"),
    (
        PreTokenizer(_isolated(rf"{_CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_LINES}")),
        "seed-coder",
    ),
    (
        PreTokenizer(
            (
                _DIGITS_FROM_RIGHT,
                *_isolated(rf"[{_ASIAN}]+", rf"{_PUNCTUATED_WORD}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_LINES}"),
            )
        ),
        "afmoe",
    ),
    (PreTokenizer(_isolated(_NEWLINES, _QWEN2)), "laguna"),
    (
        PreTokenizer(
            _isolated(
                rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+"
                rf"|\p{{N}}|{_SYMBOLS}[\r\n/]?|\s*[\r\n]|{_SPACES}"
            )
        ),
        "exaone-moe",
    ),
    (_GEMMA4_PRE, "gemma4 granite-embed-multi-311m"),
    (PreTokenizer(_isolated(_NEWLINES), byte_level=False, escape_spaces=True), "sarvam-moe"),
    (
        PreTokenizer(
            _isolated(r"\p{N}{1,3}", rf"{_CONTRACTION}|{_WORD}|\p{{N}}+|{_SYMBOLS}[\r\n]*|{_LINES}"), ignore_merges=True
        ),
        "minicpm5",
    ),
    (PreTokenizer(_isolated(r"\S+"), byte_level=False), "whitespace"),
)

PRE_TOKENIZERS: Final[Mapping[str, PreTokenizer]] = {
    name: pre_tokenizer for pre_tokenizer, names in _FAMILIES for name in names.split()
}


def pre_tokenizer(name: str) -> PreTokenizer:
    """The pre-tokenizer of that name; UnsupportedModelError for one that is not known."""
    found = PRE_TOKENIZERS.get(name)
    if found is None:
        raise UnsupportedModelError(
            f"pre-tokenizer {name!r} (tokenizer.ggml.pre) is not known",
            hint=f"known are {', '.join(sorted(PRE_TOKENIZERS))}",
        )
    return found
