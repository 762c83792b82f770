"""Measures what llama.cpp's types of the KV cache cost in quality, by the protocol of `strata kv-eval`.

    python scripts/peer_kv_types.py MODEL.gguf TEXT.txt [-c 512] [--chunks 12] [--types q8_0 q4_0]

For a table beside that of `strata kv-eval`: perplexity more than with float16, mean KL divergence from it, and how
often both would choose the same token. Needs llama-cpp-python. A head's size must be whole blocks of 32.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np
from numpy.typing import NDArray

TYPES = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0, "q4_0": llama_cpp.GGML_TYPE_Q4_0}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("-c", "--context", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=12)
    parser.add_argument("--types", choices=TYPES, nargs="+", default=["q8_0", "q4_0"])
    options = parser.parse_args()
    chunks, plain = logits_of(options.model, options.text, options.context, options.chunks, "f16")
    before = nats(chunks, plain)
    print(f"f16: perplexity {math.exp(before):.4f}")
    for kind in options.types:
        _, rows = logits_of(options.model, options.text, options.context, options.chunks, kind)
        more = math.exp(nats(chunks, rows)) - math.exp(before)
        divergence = float(np.mean(np.sum(np.exp(plain) * (plain - rows), axis=-1)))
        same = float(np.mean(plain.argmax(-1) == rows.argmax(-1)))
        print(f"{kind}: {more:+.4f}, KL {divergence:.2e}, same top {same:.2%}", flush=True)


def logits_of(
    model: Path, text: Path, context: int, chunks: int, kind: str
) -> tuple[list[Sequence[int]], NDArray[np.float64]]:
    """Token ids of each chunk, and logarithms of probabilities, (chunks, tokens that are scored, vocabulary)."""
    llama = llama_cpp.Llama(
        *(str(model),), n_ctx=context, n_batch=context, n_threads=2, n_gpu_layers=0, logits_all=True, verbose=False,
        type_k=TYPES[kind], type_v=TYPES[kind], flash_attn=True,
    )  # fmt: skip
    ids = llama.tokenize(text.read_bytes(), add_bos=True, special=False)
    cut = [list(ids[number * context : (number + 1) * context]) for number in range(chunks)]
    rows = []
    for tokens in cut:
        if llama._model.add_bos_token():
            tokens[0] = llama.token_bos()
        llama.reset()
        llama.eval(tokens)
        scores = np.array(llama.scores[context // 2 : context - 1], np.float64)
        scores -= scores.max(-1, keepdims=True)
        rows.append(scores - np.log(np.exp(scores).sum(-1, keepdims=True)))
    llama.close()
    return cut, np.stack(rows)


def nats(chunks: Sequence[Sequence[int]], rows: NDArray[np.float64]) -> float:
    """Mean negative logarithm of the probability of what comes."""
    context = len(chunks[0])
    losses = [-its[np.arange(len(its)), ids[context // 2 + 1 :]] for ids, its in zip(chunks, rows, strict=True)]
    return float(np.mean(losses))


if __name__ == "__main__":
    main()
