"""A stand-in for the module `llama_cpp`: the calls strata makes, on a model that predicts (token + position) mod 7.

Sequences are kept as llama.cpp keeps them: by id, with positions that must follow on.
"""

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np

VOCABULARY = 4096
RAM_BUFFERS = 0x5EED


class Batch:
    """`llama_batch` with Python lists."""

    def __init__(self, size: int) -> None:
        self.n_tokens = size
        self.token = [0] * size
        self.pos = [0] * size
        self.n_seq_id = [0] * size
        self.seq_id = [[0] for _ in range(size)]
        self.logits = [False] * size


class FakeLlamaCpp:
    """The functions of the module; `fail` names the step that goes wrong."""

    GGML_TYPE_F32, GGML_TYPE_F16 = 0, 1
    LLAMA_LOAD_MODE_NONE, LLAMA_LOAD_MODE_MMAP = 0, 1

    def __init__(self, fail: str = "") -> None:
        self.fail = fail
        self.sequences: dict[int, int] = {}
        self.open_batches = 0
        self.freed: list[str] = []
        self.model_params: Any = None
        self.context_params: Any = None
        self.log: Any = None
        self.held_back: list[tuple[str, int]] = []
        self.llama_cpp = SimpleNamespace(_lib=SimpleNamespace(ggml_backend_cpu_buffer_type=_RamBuffers()))
        self._rows: dict[int, np.ndarray] = {}

    def llama_backend_init(self) -> None:
        pass

    def llama_log_callback(self, function: Any) -> Any:
        return function

    def llama_log_set(self, callback: Any, _data: Any) -> None:
        self.log = callback
        callback(2, b"a line of the library\n", None)

    def llama_model_default_params(self) -> SimpleNamespace:
        return SimpleNamespace()

    def llama_context_default_params(self) -> SimpleNamespace:
        return SimpleNamespace()

    def llama_model_load_from_file(self, _path: bytes, params: SimpleNamespace) -> str | None:
        self.model_params = params
        self.held_back = _entries(getattr(params, "tensor_buft_overrides", 0))
        return None if self.fail == "load" else "model"

    def llama_init_from_model(self, _model: str, params: SimpleNamespace) -> str | None:
        self.context_params = params
        return None if self.fail == "context" else "context"

    def llama_get_memory(self, _context: str) -> str:
        return "memory"

    def llama_model_get_vocab(self, _model: str) -> str:
        return "vocabulary"

    def llama_vocab_n_tokens(self, _vocabulary: str) -> int:
        return VOCABULARY

    def llama_batch_init(self, size: int, _embeddings: int, _sequences: int) -> Batch:
        self.open_batches += 1
        return Batch(size)

    def llama_batch_free(self, _batch: Batch) -> None:
        self.open_batches -= 1

    def llama_decode(self, _context: str, batch: Batch) -> int:
        if self.fail == "decode":
            return 2
        self._rows = {}
        for index in range(batch.n_tokens):
            sequence = batch.seq_id[index][0]
            assert batch.pos[index] == self.sequences.get(sequence, 0), "positions follow on"
            self.sequences[sequence] = batch.pos[index] + 1
            if batch.logits[index]:
                row = np.zeros(VOCABULARY, np.float32)
                row[(batch.token[index] + batch.pos[index]) % 7 + 100] = 5.0
                self._rows[index] = row
        return 0

    def llama_get_logits_ith(self, _context: str, index: int) -> Any:
        return self._rows[index].ctypes.data_as(ctypes.POINTER(ctypes.c_float))

    def llama_memory_seq_rm(self, _memory: str, sequence: int, start: int, _end: int) -> None:
        self.sequences[sequence] = min(start, self.sequences.get(sequence, 0))

    def llama_free(self, _context: str) -> None:
        self.freed.append("context")

    def llama_model_free(self, _model: str) -> None:
        self.freed.append("model")


class _RamBuffers:
    """A function of the C library: called without arguments, told its result's type."""

    restype: Any = None

    def __call__(self) -> int:
        return RAM_BUFFERS


def _entries(address: int) -> list[tuple[str, int]]:
    """(pattern, buffer type) of the C array at `address`, up to its empty entry."""
    pair, found = ctypes.c_void_p * 2, []
    while address and (entry := pair.from_address(address))[0]:
        pattern = ctypes.string_at(entry[0] or 0).decode()
        found.append((pattern, entry[1] or 0))
        address += ctypes.sizeof(pair)
    return found
