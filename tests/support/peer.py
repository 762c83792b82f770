"""Logits and greedy tokens from llama.cpp, through llama-cpp-python; imports it only when called."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def _open(path: Path, capacity_tokens: int, float32_kv: bool) -> Any:
    import llama_cpp

    kind = llama_cpp.GGML_TYPE_F32 if float32_kv else llama_cpp.GGML_TYPE_F16
    return llama_cpp.Llama(
        str(path), n_ctx=capacity_tokens, n_threads=2, n_threads_batch=2, n_gpu_layers=0, logits_all=True,
        type_k=kind, type_v=kind, verbose=False,
    )  # fmt: skip


def version() -> str:
    """Of llama-cpp-python."""
    import llama_cpp

    return str(llama_cpp.__version__)


def logits_of(
    path: Path, ids: Sequence[int], *, capacity_tokens: int = 128, float32_kv: bool = True
) -> NDArray[np.float32]:
    """Logits of every position, (tokens, vocab)."""
    llama = _open(path, capacity_tokens, float32_kv)
    try:
        llama.eval(list(ids))
        return np.array(llama.scores[: len(ids)], dtype=np.float32)
    finally:
        llama.close()


def tokens_of(path: Path, text: str) -> list[int]:
    """The text's ids, with BOS where the model wants it."""
    llama = _open(path, 64, False)
    try:
        return list(llama.tokenize(text.encode(), add_bos=True, special=False))
    finally:
        llama.close()


def greedy(path: Path, ids: Sequence[int], count: int) -> tuple[list[int], NDArray[np.float32]]:
    """The most probable next tokens, and the logits each was chosen from, (count, vocab)."""
    llama = _open(path, len(ids) + count, False)
    try:
        llama.eval(list(ids))
        tokens: list[int] = []
        rows = []
        while True:
            rows.append(np.array(llama.scores[llama.n_tokens - 1], dtype=np.float32))
            tokens.append(int(rows[-1].argmax()))
            if len(tokens) == count:
                return tokens, np.stack(rows)
            llama.eval(tokens[-1:])
    finally:
        llama.close()
