"""llama.cpp as an executor, for architectures and quant types that strata's own loop does not know.

Needs the extra `peer`. Loads by the flags that `strata plan --for llama.cpp` prints. Knows nothing of sampling: like
every executor it turns tokens into logits. Invariant: a sequence's rows live under one llama.cpp sequence id, freed
with its handle.
"""

import ctypes
import logging
import weakref
from collections.abc import Sequence
from importlib.metadata import version
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from offload.errors import DeviceError, RequestError, UnsupportedModelError
from offload.gguf import GGUFFile
from planner.llama_cpp_flags import LlamaCppFlags, llama_cpp_flags
from planner.plan import Plan
from runtime.executor.base import Step

log = logging.getLogger("strata.executor.llama_cpp")

MAX_SEQUENCES = 64


def load_library() -> ModuleType:
    """The module `llama_cpp`; a typed error where the extra is missing."""
    try:
        import llama_cpp  # noqa: PLC0415 - optional and heavy
    except ImportError as error:
        raise UnsupportedModelError(
            "--engine llama.cpp needs llama-cpp-python, which is not installed",
            hint="pip install 'strata[peer]' (builds it with a C++ compiler)",
        ) from error
    return llama_cpp  # type: ignore[no-any-return]


class LlamaCppKV:
    """The rows of one sequence inside llama.cpp's own cache."""

    def __init__(self, executor: "LlamaCppExecutor", sequence_id: int, capacity_tokens: int) -> None:
        self.sequence_id = sequence_id
        self.capacity_tokens = capacity_tokens
        self.length = 0
        self._executor = executor
        weakref.finalize(self, executor.release, sequence_id)

    def truncate(self, length: int) -> None:
        """Forget the rows from `length` on."""
        if length < self.length:
            self._executor.remove(self.sequence_id, length)
            self.length = length


class _BufferOverride(ctypes.Structure):
    """`struct llama_model_tensor_buft_override` of llama.h: tensors by name, and the kind of memory that gets them."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


class LlamaCppExecutor:
    """A model and a context of llama.cpp."""

    def __init__(self, gguf: GGUFFile, plan: Plan) -> None:
        self._library = lib = load_library()
        lib.llama_backend_init()
        log.warning("computed by llama.cpp %s, placed by strata's plan", version("llama-cpp-python"))
        self._log_callback = _keep_quiet(lib)
        flags = llama_cpp_flags(plan)
        model_params = lib.llama_model_default_params()
        model_params.n_gpu_layers = flags.gpu_layers
        if hasattr(lib, "LLAMA_LOAD_MODE_NONE"):
            model_params.load_mode = lib.LLAMA_LOAD_MODE_MMAP if flags.mmap else lib.LLAMA_LOAD_MODE_NONE
        else:  # before llama-cpp-python 0.3.36 or so
            model_params.use_mmap = flags.mmap
        overrides = _held_back(lib, flags)  # must live until the model is loaded
        if overrides is not None:
            model_params.tensor_buft_overrides = ctypes.addressof(overrides)
        self._model = lib.llama_model_load_from_file(str(gguf.path).encode(), model_params)
        if not self._model:
            raise UnsupportedModelError(f"llama.cpp cannot load {gguf.path}", hint="run again with -vv for its log")
        params = lib.llama_context_default_params()
        # llama.cpp aborts where context or batch could not hold a token of every sequence
        params.n_ctx = max(flags.context_tokens, MAX_SEQUENCES)
        params.n_batch = params.n_ubatch = max(flags.batch_tokens, MAX_SEQUENCES)
        params.n_threads = params.n_threads_batch = flags.threads
        params.type_k = getattr(lib, f"GGML_TYPE_{flags.key_type.upper()}")
        params.type_v = getattr(lib, f"GGML_TYPE_{flags.value_type.upper()}")
        params.n_seq_max = MAX_SEQUENCES
        params.kv_unified = True
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            lib.llama_model_free(self._model)
            raise DeviceError("llama.cpp cannot make a context", hint="lower -c")
        self._memory = lib.llama_get_memory(self._context)
        self._free = set(range(MAX_SEQUENCES))
        self.vocabulary = lib.llama_model_get_vocab(self._model)
        self.vocab_size = int(lib.llama_vocab_n_tokens(self.vocabulary))

    def new_kv(self, capacity_tokens: int) -> LlamaCppKV:
        """A sequence id of its own for a new sequence."""
        if not self._free:
            raise RequestError(f"llama.cpp holds {MAX_SEQUENCES} sequences already", hint="run fewer at once")
        return LlamaCppKV(self, self._free.pop(), capacity_tokens)

    def forward(
        self, steps: Sequence[Step], *, logits: Literal["last", "all", "none"] = "last"
    ) -> list[NDArray[np.float32]]:
        """Compute the steps one after the other; one (rows, vocabulary) array a step."""
        return [self._forward_one(step, logits) for step in steps]

    def _forward_one(self, step: Step, logits: str) -> NDArray[np.float32]:
        lib, count = self._library, len(step.token_ids)
        kv: Any = step.kv
        batch = lib.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            wanted = range(count) if logits == "all" else range(count - 1, count) if logits == "last" else range(0)
            for index, token in enumerate(step.token_ids):
                batch.token[index] = token
                batch.pos[index] = kv.length + index
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = kv.sequence_id
                batch.logits[index] = index in wanted
            status = lib.llama_decode(self._context, batch)
        finally:
            lib.llama_batch_free(batch)
        if status:
            raise DeviceError(f"llama.cpp failed with status {status}", hint="lower -c or run again with -vv")
        kv.length += count
        rows = np.empty((len(wanted), self.vocab_size), np.float32)
        for row, index in enumerate(wanted):
            pointer = lib.llama_get_logits_ith(self._context, index)
            rows[row] = np.ctypeslib.as_array(pointer, shape=(self.vocab_size,))
        return rows

    def remove(self, sequence_id: int, start: int) -> None:
        """Drop the rows of a sequence from `start` on."""
        self._library.llama_memory_seq_rm(self._memory, sequence_id, start, -1)

    def release(self, sequence_id: int) -> None:
        """Take back the id of a sequence that is no longer used."""
        if self._context:
            self.remove(sequence_id, 0)
        self._free.add(sequence_id)

    def close(self) -> None:
        """Free context and model."""
        if self._context:
            self._library.llama_free(self._context)
            self._library.llama_model_free(self._model)
            self._context = None


def _held_back(lib: ModuleType, flags: LlamaCppFlags) -> Any:
    """The tensors that stay in RAM, as llama.cpp's array that ends with an empty entry; None where there are none."""
    patterns = flags.held_back()
    if not patterns:
        return None
    make = lib.llama_cpp._lib.ggml_backend_cpu_buffer_type
    make.restype = ctypes.c_void_p
    ram = make()
    entries = [_BufferOverride(pattern.encode(), ram) for pattern in patterns]
    return (_BufferOverride * (len(entries) + 1))(*entries)


def _keep_quiet(lib: ModuleType) -> Any:
    """Send llama.cpp's log lines to ours at debug level; the callback must live as long as the library logs."""

    def on_line(_level: int, text: bytes, _data: ctypes.c_void_p) -> None:
        log.debug("%s", text.decode(errors="replace").rstrip())

    callback = lib.llama_log_callback(on_line)
    lib.llama_log_set(callback, None)
    return callback
