"""Typed, checked access to metadata: the value of a key as the type a caller needs, or an error naming file and key.

Knows nothing about which keys there are. Reading a value through here never gives a wrong type, a number outside of
the caller's bounds, a float that is not finite, or a text that is not UTF-8 (strings of arrays excepted).
"""

import math
from collections.abc import Sequence
from enum import Enum
from typing import Final, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from offload.errors import ModelFormatError
from offload.gguf_values import Metadata, MetadataValue, StringArray
from offload.source import FileName


class _Required(Enum):
    REQUIRED = 0


REQUIRED: Final = _Required.REQUIRED
RequiredType: TypeAlias = Literal[_Required.REQUIRED]
D = TypeVar("D")


class MetadataAccess:
    """Mixin of what holds `metadata` read from `path`. A `default` is returned as it is where the key is missing."""

    path: FileName
    metadata: Metadata

    def _wrong(self, key: str, problem: str) -> ModelFormatError:
        return ModelFormatError(
            f"{self.path}: metadata key {key!r} {problem}", hint="use another conversion of this model"
        )

    def _find(self, key: str, required: bool) -> MetadataValue | None:
        value = self.metadata.get(key)
        if value is None and required:
            raise self._wrong(key, "is missing")
        return value

    def _check_bounds(self, key: str, value: float, minimum: float | None, maximum: float | None) -> None:
        if minimum is not None and value < minimum:
            raise self._wrong(key, f"is {value}, at least {minimum} is needed")
        if maximum is not None and value > maximum:
            raise self._wrong(key, f"is {value}, at most {maximum} is allowed")

    def get_int(
        self,
        key: str,
        default: int | D | RequiredType = REQUIRED,
        *,
        minimum: int | None = None,
        maximum: int | None = None,
    ) -> int | D:
        """An integer within [minimum, maximum]."""
        value = self._find(key, default is REQUIRED)
        if value is None and default is not REQUIRED:
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(key, f"is {kind_of(value)}, an integer is needed")
        self._check_bounds(key, value, minimum, maximum)
        return value

    def get_float(
        self,
        key: str,
        default: float | D | RequiredType = REQUIRED,
        *,
        minimum: float | None = None,
        maximum: float | None = None,
    ) -> float | D:
        """A finite number within [minimum, maximum]; integers are taken too."""
        value = self._find(key, default is REQUIRED)
        if value is None and default is not REQUIRED:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self._wrong(key, f"is {kind_of(value)}, a number is needed")
        if not math.isfinite(value):
            raise self._wrong(key, f"is {value}, a finite number is needed")
        self._check_bounds(key, value, minimum, maximum)
        return float(value)

    def get_str(self, key: str, default: str | D | RequiredType = REQUIRED) -> str | D:
        """A text."""
        value = self._find(key, default is REQUIRED)
        if value is None and default is not REQUIRED:
            return default
        if not isinstance(value, str):
            raise self._wrong(key, f"is {kind_of(value)}, a string is needed")
        if not is_utf8(value):
            raise self._wrong(key, "is not valid UTF-8")
        return value

    def get_bool(self, key: str, default: bool | D | RequiredType = REQUIRED) -> bool | D:
        """A truth value."""
        value = self._find(key, default is REQUIRED)
        if value is None and default is not REQUIRED:
            return default
        if not isinstance(value, bool):
            raise self._wrong(key, f"is {kind_of(value)}, a bool is needed")
        return value

    def get_strings(self, key: str, default: Sequence[str] | D | RequiredType = REQUIRED) -> Sequence[str] | D:
        """An array of strings, decoded element by element; bytes that are not UTF-8 become lone surrogates."""
        value = self._find(key, default is REQUIRED)
        if value is None and default is not REQUIRED:
            return default
        if not isinstance(value, StringArray):
            raise self._wrong(key, f"is {kind_of(value)}, an array of strings is needed")
        return value

    def get_ints(self, key: str, default: NDArray[np.int64] | D | RequiredType = REQUIRED) -> NDArray[np.int64] | D:
        """An array of integers or bools (1 and 0), as int64 of shape (n,)."""
        value = self._find(key, default is REQUIRED)
        if value is None and default is not REQUIRED:
            return default
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iub":
            raise self._wrong(key, f"is {kind_of(value)}, an array of integers is needed")
        if value.dtype == np.uint64 and value.size and int(value.max()) >= 2**63:
            raise self._wrong(key, f"holds {int(value.max())}, more than 2^63 - 1")
        return value.astype(np.int64)

    def get_floats(
        self, key: str, default: NDArray[np.float64] | D | RequiredType = REQUIRED
    ) -> NDArray[np.float64] | D:
        """An array of numbers, as float64 of shape (n,); NaN and infinities are handed on."""
        value = self._find(key, default is REQUIRED)
        if value is None and default is not REQUIRED:
            return default
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf":
            raise self._wrong(key, f"is {kind_of(value)}, an array of numbers is needed")
        return value.astype(np.float64)


def kind_of(value: MetadataValue | None) -> str:
    """What a value is, in words for a message."""
    if isinstance(value, StringArray):
        return "an array of strings"
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype.name}"
    names = {bool: "a bool", int: "an integer", float: "a float", str: "a string"}
    return names.get(type(value), "nothing")


def is_utf8(text: str) -> bool:
    """Whether `text` came from valid UTF-8 (holds no lone surrogate)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
