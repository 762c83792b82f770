"""A GGUF file of any size whose weights were never written: a real header before a hole."""

import os
from pathlib import Path

from tests.support.gguf_bytes import STRING, U32, GGUFBytes
from tests.support.planning import HeaderOnly


def write_sparse(path: Path, model: HeaderOnly, *, vocabulary: int = 0) -> int:
    """Write `model`'s header, with a vocabulary of that many tokens, and leave room for its weights; bytes in all."""
    file = GGUFBytes()
    for key, value in model.metadata.items():
        assert isinstance(value, int | str)
        file.value(key, STRING if isinstance(value, str) else U32, value)
    if vocabulary:
        file.value("tokenizer.ggml.model", STRING, "gpt2")
        file.values("tokenizer.ggml.tokens", STRING, [f"token-{index}" for index in range(vocabulary)])
        file.values("tokenizer.ggml.merges", STRING, [f"a{index} b{index}" for index in range(vocabulary)])
    end = 0
    for tensor in model.tensors.values():
        file.tensor(tensor.name, tensor.quant_type.ggml_id, tensor.shape[::-1], offset=end)
        end += -(-tensor.num_bytes // file.alignment) * file.alignment
    path.write_bytes(file.build())
    os.truncate(path, path.stat().st_size + end)
    return path.stat().st_size
