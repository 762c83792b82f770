"""Strict JSON documents of frozen dataclasses: what is written reads back equal, anything else is an error.

Knows nothing about plans or profiles: it works from the type hints alone. Supported hints: int, float, str, bool,
enums of strings, dataclasses, `X | None`, `tuple[X, ...]`, `tuple[X, Y]` and `Mapping[str, X]`. Every error is a
`ValueError` that names the place in the document ("placements[3].tier").
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from enum import StrEnum
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

_T = TypeVar("_T")


def encode(value: object) -> Any:
    """`value` as JSON types: dataclasses become objects, tuples arrays, enums their strings."""
    if dataclasses.is_dataclass(value):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [encode(item) for item in value]
    return value


def dumps(value: object) -> str:
    """`value` as indented JSON text; ValueError for NaN and infinities, which JSON cannot carry."""
    return json.dumps(encode(value), indent=2, ensure_ascii=False, allow_nan=False)


def loads(cls: type[_T], text: str) -> _T:
    """The `cls` written in `text`; ValueError naming the place where the text is not such a document."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("the document is nested too deeply") from error
    return decode(cls, value)


def decode(cls: type[_T], value: Any, where: str = "") -> _T:
    """The JSON `value` as an instance of the dataclass `cls`: no key missing, none unknown, every type right."""
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'the document'} must be an object, not {_kind(value)}")
    prefix = f"{where}." if where else ""
    hints = get_type_hints(cls)
    if unknown := sorted(value.keys() - hints.keys()):
        raise ValueError(f"unknown key {prefix}{unknown[0]}")
    if missing := sorted(hints.keys() - value.keys()):
        raise ValueError(f"{prefix}{missing[0]} is missing")
    return cls(**{name: _decode_as(hint, value[name], prefix + name) for name, hint in hints.items()})


def _decode_as(hint: Any, value: Any, where: str) -> Any:
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        inner = [choice for choice in get_args(hint) if choice is not NoneType]
        return None if value is None else _decode_as(inner[0], value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} must be an array, not {_kind(value)}")
        of_items = get_args(hint)
        hints = [of_items[0]] * len(value) if of_items[-1] is Ellipsis else of_items
        if len(value) != len(hints):
            raise ValueError(f"{where} must have {len(hints)} items, not {len(value)}")
        items = enumerate(zip(hints, value, strict=True))
        return tuple(_decode_as(item_hint, item, f"{where}[{i}]") for i, (item_hint, item) in items)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be an object, not {_kind(value)}")
        return {key: _decode_as(get_args(hint)[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return decode(hint if isinstance(hint, type) else type(hint), value, where)
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        choices = [choice.value for choice in hint]
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{where} must be one of {', '.join(choices)}, not {value!r}")
        return hint(value)
    return _scalar(hint, value, where)


def _scalar(hint: type, value: Any, where: str) -> Any:
    if hint is float and type(value) in (int, float):
        number = float(value) if abs(value) < 1e300 else math.inf
        if not math.isfinite(number):
            raise ValueError(f"{where} is too large")
        return number
    if type(value) is not hint:
        raise ValueError(f"{where} must be {_NAMES[hint]}, not {_kind(value)}")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number a document may hold")


_NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "an array"
    return f"{_NAMES.get(type(value), type(value).__name__)} ({str(value)[:40]!r})"
