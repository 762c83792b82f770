"""Typed access to metadata."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from offload.errors import ModelFormatError
from offload.gguf import GGUFFile
from tests.support.gguf_bytes import BOOL, F32, I32, STRING, U8, U32, U64, GGUFBytes


@pytest.fixture
def gguf(tmp_path: Path) -> Iterator[GGUFFile]:
    file = GGUFBytes()
    file.value("int", I32, -5).value("big", U64, 2**64 - 1).value("float", F32, 0.5).value("bool", BOOL, 1)
    file.value("nan", F32, float("nan")).value("str", STRING, "text").value("bytes", STRING, b"\xff\xfeabc")
    file.value("long", STRING, "x" * 5000 + "é")
    file.values("ints", U8, [1, 2, 255]).values("floats", F32, [0.5, float("inf")]).values("bools", BOOL, [1, 0])
    file.values("huge", U64, [2**63]).values("strings", STRING, ["a", b"\xff"]).values("none", U32, [])
    path = tmp_path / "model.gguf"
    path.write_bytes(file.build())
    with GGUFFile.open(path) as opened:
        yield opened


def test_values(gguf: GGUFFile) -> None:
    assert gguf.get_int("int") == -5
    assert gguf.get_int("big") == 2**64 - 1
    assert gguf.get_float("float") == 0.5
    assert gguf.get_float("int") == -5.0
    assert gguf.get_bool("bool") is True
    assert gguf.get_str("str") == "text"
    assert gguf.get_str("long") == "x" * 5000 + "é"
    assert gguf.get_ints("ints").tolist() == [1, 2, 255]
    assert gguf.get_ints("ints").dtype == np.int64
    assert gguf.get_ints("bools").tolist() == [1, 0]
    assert gguf.get_ints("none").shape == (0,)
    assert gguf.get_floats("floats").tolist() == [0.5, float("inf")]
    assert gguf.get_floats("ints").tolist() == [1.0, 2.0, 255.0]


def test_foreign_bytes_can_be_had_back(gguf: GGUFFile) -> None:
    strings = gguf.get_strings("strings")
    assert strings[1].encode("utf-8", "surrogateescape") == b"\xff"
    shown = gguf.metadata["bytes"]
    assert isinstance(shown, str)
    assert shown.encode("utf-8", "surrogateescape") == b"\xff\xfeabc"


def test_defaults(gguf: GGUFFile) -> None:
    assert gguf.get_int("no", 3) == 3
    assert gguf.get_int("no", None) is None
    assert gguf.get_float("no", 2) == 2
    assert gguf.get_str("no", "x") == "x"
    assert gguf.get_bool("no", False) is False
    assert gguf.get_strings("no", ()) == ()
    assert gguf.get_ints("no", None) is None
    assert gguf.get_floats("no", None) is None


WRONG: list[tuple[Callable[[GGUFFile], object], str]] = [
    (lambda gguf: gguf.get_int("float"), "'float' is a float, an integer is needed"),
    (lambda gguf: gguf.get_int("bool"), "'bool' is a bool, an integer is needed"),
    (lambda gguf: gguf.get_int("int", minimum=0), "'int' is -5, at least 0 is needed"),
    (lambda gguf: gguf.get_int("big", maximum=10), "'big' is 18446744073709551615, at most 10 is allowed"),
    (lambda gguf: gguf.get_int("int", 7, minimum=0), "'int' is -5, at least 0 is needed"),
    (lambda gguf: gguf.get_float("nan"), "'nan' is nan, a finite number is needed"),
    (lambda gguf: gguf.get_float("float", minimum=1), "'float' is 0.5, at least 1 is needed"),
    (lambda gguf: gguf.get_float("str"), "'str' is a string, a number is needed"),
    (lambda gguf: gguf.get_float("bool"), "'bool' is a bool, a number is needed"),
    (lambda gguf: gguf.get_str("int"), "'int' is an integer, a string is needed"),
    (lambda gguf: gguf.get_str("bytes"), "'bytes' is not valid UTF-8"),
    (lambda gguf: gguf.get_bool("int"), "'int' is an integer, a bool is needed"),
    (lambda gguf: gguf.get_strings("ints"), "'ints' is an array of uint8, an array of strings is needed"),
    (lambda gguf: gguf.get_ints("floats"), "'floats' is an array of float32, an array of integers is needed"),
    (lambda gguf: gguf.get_ints("int"), "'int' is an integer, an array of integers is needed"),
    (lambda gguf: gguf.get_ints("huge"), "'huge' holds 9223372036854775808, more than 2^63 - 1"),
    (lambda gguf: gguf.get_floats("strings"), "'strings' is an array of strings, an array of numbers is needed"),
    (lambda gguf: gguf.get_floats("bools"), "'bools' is an array of bool, an array of numbers is needed"),
    (lambda gguf: gguf.get_int("no"), "'no' is missing"),
    (lambda gguf: gguf.get_strings("no"), "'no' is missing"),
]


@pytest.mark.parametrize(("get", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_is_wrong_is_named(gguf: GGUFFile, get: Callable[[GGUFFile], object], message: str) -> None:
    with pytest.raises(ModelFormatError) as caught:
        get(gguf)
    assert str(caught.value) == f"{gguf.path}: metadata key {message}"
    assert caught.value.hint
