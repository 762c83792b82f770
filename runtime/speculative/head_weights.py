"""The weights of a draft head, as its file has them: matrices as rows of inputs by columns of outputs, float16.

Knows nothing of how they are multiplied. Written by scripts/train_draft.py. Invariant: shapes go together, and every
weight is a number.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from offload.errors import ModelFormatError

SUFFIX = ".npz"
HalfMatrix = NDArray[np.float16]


@dataclass(frozen=True, slots=True)
class HeadWeights:
    """d is the target's width, f that of the feed-forward part; `embedding` has a row for every token."""

    w1: HalfMatrix  # (d, d)
    w2: HalfMatrix  # (d, d)
    wz: HalfMatrix  # (2 d, d)
    wu: HalfMatrix  # (d, f)
    wd: HalfMatrix  # (f, d)
    embedding: HalfMatrix  # (vocabulary, d)

    @classmethod
    def load(cls, path: Path) -> "HeadWeights":
        """Reads a head; ModelFormatError for a file that is none."""
        try:
            with np.load(path, allow_pickle=False) as file, np.errstate(over="ignore"):  # what becomes infinite is told
                made = cls(*(np.asarray(file[one.name], np.float16) for one in fields(cls)))
        except (OSError, KeyError, ValueError, BadZipFile) as error:
            raise ModelFormatError(f"{path} is no draft head: {error}", hint="train one with train_draft.py") from error
        made._check(path)
        return made

    @property
    def width(self) -> int:
        """Of the target's hidden states."""
        return int(self.w1.shape[0])

    @property
    def inner(self) -> int:
        """Width of the feed-forward part."""
        return int(self.wu.shape[1])

    @property
    def vocab_size(self) -> int:
        """Tokens it has a row for."""
        return int(self.embedding.shape[0])

    @property
    def num_bytes(self) -> int:
        """Of all weights."""
        return sum(getattr(self, one.name).nbytes for one in fields(self))

    def _check(self, path: Path) -> None:
        """ModelFormatError where shapes do not go together or a weight is no number."""
        found = [getattr(self, one.name) for one in fields(self)]
        width, inner = self.w1.shape[-1], self.wu.shape[-1]
        expected = [(width, width), (width, width), (2 * width, width), (width, inner), (inner, width)]
        table = self.embedding
        if [one.shape for one in found[:5]] != expected or table.ndim != 2 or table.shape[1] != width:
            raise ModelFormatError(f"{path}: the shapes of a draft head do not go together")
        if not all(np.isfinite(one).all() for one in found):
            raise ModelFormatError(f"{path}: a weight of the draft head is not a number")
