"""Which experts a model used, token by token: recorded while it runs, kept in a file, read back for replays.

A layer here is one that routes, numbered from 0 in the order of the model. Knows nothing about caches.
Invariant: of every token the experts of a layer are distinct and in range; a file that breaks this is refused.
"""

import io
import os
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offload.errors import FlashError, ModelFormatError
from offload.gguf_access import MetadataAccess

FORMAT = "strata-routing-trace"
FORMAT_VERSION = 1
MAX_EXPERTS = 1 << 15  # ids are int16


@dataclass(frozen=True, slots=True)
class RoutingTrace:
    """The experts that each token used in each layer. ValueError where the arrays contradict the numbers."""

    model: str  # its name: a trace says nothing about another model
    experts: int  # of a layer
    topk_ids: NDArray[np.int16]  # (tokens, layers, used)
    sequence: NDArray[np.int64]  # (sequences,) the first token of each, rising, the first 0
    topk_weights: NDArray[np.float32] | None = None  # (tokens, layers, used)

    def __post_init__(self) -> None:
        ids, starts = self.topk_ids, self.sequence
        if ids.ndim != 3 or ids.dtype != np.int16 or not 0 < self.experts <= MAX_EXPERTS:
            raise ValueError(f"ids of shape {ids.shape} and type {ids.dtype} of {self.experts} experts")
        if not ids.shape[1] or not 0 < ids.shape[2] <= self.experts:
            raise ValueError(f"{ids.shape[1]} layers, {ids.shape[2]} of {self.experts} experts used")
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self.experts:
            raise ValueError(f"ids from {ids.min()} to {ids.max()} of {self.experts} experts")
        if not np.diff(np.sort(ids, axis=2), axis=2).all():
            raise ValueError("a token uses an expert twice")
        rising = starts.ndim == 1 and starts.dtype == np.int64 and bool((np.diff(starts, append=len(ids)) > 0).all())
        if not rising or starts[:1].tolist() != [0] * min(len(ids), 1):
            raise ValueError("sequences do not begin at tokens in rising order")
        weights = self.topk_weights
        if weights is not None and (
            weights.shape != ids.shape or weights.dtype != np.float32 or not np.isfinite(weights).all()
        ):
            raise ValueError("weights are not one number for each expert used")

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return int(self.topk_ids.shape[0])

    @property
    def layers(self) -> int:
        """Layers that route."""
        return int(self.topk_ids.shape[1])

    @property
    def used(self) -> int:
        """Experts a token uses in a layer."""
        return int(self.topk_ids.shape[2])

    def save(self, path: Path) -> None:
        """Write the file whole or not at all; FlashError where it cannot be written."""
        arrays: dict[str, Any] = {
            "format": np.array(FORMAT),
            "version": np.array(FORMAT_VERSION),
            "model": np.array(self.model),
            "experts": np.array(self.experts),
            "topk_ids": self.topk_ids,
            "sequence": self.sequence,
            "topk_weights": _NO_WEIGHTS if self.topk_weights is None else self.topk_weights,
        }
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                np.savez(file, **arrays)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            raise FlashError(f"{path}: the routing trace cannot be written: {error.strerror}") from error
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> "RoutingTrace":
        """The trace in a file; FlashError where it cannot be read, ModelFormatError where it is no sound trace."""
        try:
            arrays = _read_arrays(path)
            if str(arrays["format"]) != FORMAT:
                raise ModelFormatError(f"{path} is not a routing trace", hint=_RECORD)
            if int(arrays["version"]) != FORMAT_VERSION:
                raise ModelFormatError(
                    f"{path} is a routing trace of version {int(arrays['version'])}, known is {FORMAT_VERSION}",
                    hint=_RECORD,
                )
            return cls(
                str(arrays["model"]),
                int(arrays["experts"]),
                arrays["topk_ids"],
                arrays["sequence"],
                None if arrays["topk_weights"].ndim == 1 else arrays["topk_weights"],
            )
        except OSError as error:
            raise FlashError(f"{path}: the routing trace cannot be read: {error.strerror or error}") from error
        except _DAMAGE as error:
            raise ModelFormatError(f"{path} is no routing trace, or a damaged one: {error}", hint=_RECORD) from error

    def check_model(self, model: str, layers: int, experts: int) -> None:
        """ModelFormatError unless the trace is of the model of that name and shape."""
        if (self.model, self.layers, self.experts) != (model, layers, experts):
            raise ModelFormatError(
                f"the routing trace is of {self.model} ({self.layers} layers of {self.experts} experts), "
                f"not of {model} ({layers} layers of {experts})",
                hint=_RECORD,
            )


@dataclass(slots=True)
class TraceRecorder:
    """Collects what the routers of a running model decide."""

    model: str
    layers: int
    experts: int
    used: int
    _ids: list[NDArray[np.int16]] = field(default_factory=list)  # (n, layers, used) of each step that ended
    _weights: list[NDArray[np.float32]] = field(default_factory=list)
    _sequence: list[int] = field(default_factory=list)
    _tokens: int = 0
    _step: dict[int, tuple[NDArray[np.int16], NDArray[np.float32] | None]] = field(default_factory=dict)

    def begin_sequence(self) -> None:
        """The next step is the first of a new sequence."""
        if not self._sequence or self._sequence[-1] != self._tokens:
            self._sequence.append(self._tokens)

    def add(self, layer: int, topk_ids: NDArray[Any], topk_weights: NDArray[Any] | None = None) -> None:
        """What a layer chose for the step's tokens, both (n, used); copied. Each layer once a step."""
        if topk_ids.ndim != 2 or topk_ids.shape[1] != self.used or not 0 <= layer < self.layers or layer in self._step:
            raise ValueError(f"layer {layer}, ids of shape {topk_ids.shape}")
        weights = None if topk_weights is None else topk_weights.astype(np.float32)
        self._step[layer] = (topk_ids.astype(np.int16), weights)

    def end_step(self) -> None:
        """The step's tokens are through all layers; ValueError where a layer is missing or has another length.

        A step without any layer added counts for nothing.
        """
        step, self._step = self._step, {}
        if not step:
            return
        parts = [step.get(layer) for layer in range(self.layers)]
        found = [part for part in parts if part is not None]
        if len(found) < self.layers or len({part[0].shape for part in found}) != 1:
            raise ValueError(f"a step with {len(found)} of {self.layers} layers, or of different lengths")
        if not self._sequence:
            self.begin_sequence()
        self._ids.append(np.stack([ids for ids, _ in found], axis=1))
        weights = [weights for _, weights in found if weights is not None]
        if len(weights) == self.layers:
            self._weights.append(np.stack(weights, axis=1))
        self._tokens += len(self._ids[-1])

    def drop_step(self) -> None:
        """Forgets what was added since the last end of a step, which failed."""
        self._step.clear()

    def trace(self) -> RoutingTrace:
        """All steps that ended; with weights where every one had them."""
        empty = (0, self.layers, self.used)
        ids = np.concatenate([np.zeros(empty, np.int16), *self._ids])
        weighted = bool(self._ids) and len(self._weights) == len(self._ids)
        starts = [start for start in self._sequence if start < self._tokens]
        return RoutingTrace(
            self.model,
            self.experts,
            ids,
            np.array(starts, np.int64),
            np.concatenate(self._weights) if weighted else None,
        )


def model_name(gguf: MetadataAccess) -> str:
    """What a model is called in traces: `general.name`, or its file's name without the suffix."""
    return gguf.get_str("general.name", "") or gguf.path.stem


_RECORD = "record one with `strata run --record-routing TRACE.npz`"
_MEMBERS = ("format", "version", "model", "experts", "topk_ids", "sequence", "topk_weights")
_NO_WEIGHTS = np.zeros(0, np.float32)
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, TypeError, MemoryError, RuntimeError)


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The file's members; their checksums are verified by the archive's reader."""
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        size = path.stat().st_size
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name not in _MEMBERS or name in arrays or member.file_size > size:
                raise ValueError(f"{member.filename!r} of {member.file_size} bytes is no part of one")
            arrays[name] = np.lib.format.read_array(io.BytesIO(archive.read(member)), allow_pickle=False)
    return arrays
