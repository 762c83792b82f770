"""GGUF files that hold nothing but a small vocabulary, of every kind the tokenizers know."""

from collections.abc import Sequence
from pathlib import Path

from runtime.tokenizer.bpe import byte_alphabet
from tests.support.gguf_bytes import BOOL, F32, I32, STRING, U8, U32, GGUFBytes

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
ALPHABET = list(byte_alphabet())
KeyValue = bool | int | str | bytes


def write_vocabulary(
    path: Path,
    model: str,
    tokens: Sequence[str | bytes],
    *,
    kinds: Sequence[int] | None = None,
    scores: Sequence[float] | None = None,
    merges: Sequence[str] | None = None,
    pre: str | None = None,
    architecture: str = "llama",
    name: str = "test",
    **keys: KeyValue,
) -> Path:
    """The file; `keys` are more of `tokenizer.ggml.`, `chat_template` stands for itself."""
    file = GGUFBytes()
    file.value("general.architecture", STRING, architecture)
    file.value("general.name", STRING, name)
    file.value("tokenizer.ggml.model", STRING, model)
    if pre is not None:
        file.value("tokenizer.ggml.pre", STRING, pre)
    file.values("tokenizer.ggml.tokens", STRING, tokens)
    if kinds is not None:
        file.values("tokenizer.ggml.token_type", I32, kinds)
    if scores is not None:
        file.values("tokenizer.ggml.scores", F32, scores)
    if merges is not None:
        file.values("tokenizer.ggml.merges", STRING, merges)
    for key, value in keys.items():
        full = f"tokenizer.{key}" if key.startswith("chat_template") else f"tokenizer.ggml.{key.replace('__', '.')}"
        if isinstance(value, bytes):
            file.values(full, U8, list(value))
        else:
            kind = BOOL if isinstance(value, bool) else STRING if isinstance(value, str) else U32
            file.value(full, kind, value)
    path.write_bytes(file.build())
    return path


def write_byte_level(
    path: Path,
    merges: Sequence[str] = ("Ġ t", "h e", "Ġt he", "Ã ©", "l l"),
    *,
    special: Sequence[str] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    user_defined: Sequence[str] = ("<think>",),
    pre: str | None = "gpt-2",
    architecture: str = "llama",
    name: str = "test",
    **keys: KeyValue,
) -> Path:
    """Byte-level BPE: all bytes, what the merges give, control tokens (the first is BOS and EOS), user-defined ones."""
    tokens = [*ALPHABET, *dict.fromkeys(merge.replace(" ", "") for merge in merges)]
    kinds = [NORMAL] * len(tokens) + [CONTROL] * len(special) + [USER_DEFINED] * len(user_defined)
    keys = {"bos_token_id": len(tokens), "eos_token_id": len(tokens), **keys}
    tokens += [*special, *user_defined]
    return write_vocabulary(
        path, "gpt2", tokens, kinds=kinds, merges=merges, pre=pre, architecture=architecture, name=name, **keys
    )


def write_sentencepiece(
    path: Path,
    pieces: Sequence[tuple[str, float]] = (("▁", -1), ("a", -2), ("b", -3), ("▁a", -4), ("ab", -5), ("▁▁", -6)),
    *,
    user_defined: Sequence[str] = (),
    **keys: KeyValue,
) -> Path:
    """SentencePiece BPE: <unk>, <s>, </s>, bytes, user-defined tokens, then the pieces with their scores."""
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *user_defined, *(piece for piece, _ in pieces)]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[USER_DEFINED] * len(user_defined), *[NORMAL] * len(pieces)]
    scores = [0.0] * (len(tokens) - len(pieces)) + [score for _, score in pieces]
    return write_vocabulary(path, "llama", tokens, kinds=kinds, scores=scores, **keys)
