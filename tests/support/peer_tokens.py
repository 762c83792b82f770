"""Token ids and pieces from llama.cpp's vocabulary code, through llama-cpp-python; imports it only when called."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class PeerVocabulary:
    """`ids[text]` by (add_special, parse_special); `pieces` with special tokens' names."""

    ids: list[dict[tuple[bool, bool], list[int]]]
    pieces: list[bytes]
    eog_ids: set[int]


def read_peer(path: Path, texts: Sequence[str]) -> PeerVocabulary:
    """All of it for one file; AssertionError if llama.cpp refuses the file."""
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
    assert model, f"llama.cpp does not load {path}"
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    count = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def encode(text: str, add_special: bool, parse_special: bool) -> list[int]:
        data = text.encode()
        ids = (ctypes.c_int32 * (4 * len(data) + 16))()
        found = llama_cpp.llama_tokenize(vocabulary, data, len(data), ids, len(ids), add_special, parse_special)
        return list(ids[:found])

    def piece(token_id: int) -> bytes:
        buffer = ctypes.create_string_buffer(1024)
        length = llama_cpp.llama_token_to_piece(vocabulary, token_id, buffer, len(buffer), 0, True)
        return buffer.raw[:length]

    flags = [(add, parse) for add in (False, True) for parse in (False, True)]
    result = PeerVocabulary(
        [{(add, parse): encode(text, add, parse) for add, parse in flags} for text in texts],
        [piece(token_id) for token_id in range(count)],
        {token_id for token_id in range(count) if llama_cpp.llama_vocab_is_eog(vocabulary, token_id)},
    )
    llama_cpp.llama_model_free(model)
    return result
