"""Manifests: what is written reads back equal, anything else is refused."""

import json
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import ModelFormatError
from offload.store_key import SourceIdentity, StoreKey
from offload.store_manifest import Manifest, decode, encode, lay_out
from tests.support.stores import BUNDLES, KEY

PATH = Path("manifest.json")
MANIFEST = Manifest(KEY, lay_out(BUNDLES))
NUMBER = st.integers(0, 2**63)
SOURCE = st.builds(SourceIdentity, st.text(), st.text(), NUMBER, NUMBER, NUMBER)
NAMED = st.lists(st.tuples(st.text(), st.integers(0, 2**40)), unique_by=lambda pair: pair[0], max_size=5)


@given(sources=st.lists(SOURCE, min_size=1, max_size=3), layout=st.text(), bundles=NAMED)
@settings(max_examples=60, deadline=None)
def test_every_manifest_reads_back_equal(
    sources: list[SourceIdentity], layout: str, bundles: list[tuple[str, int]]
) -> None:
    manifest = Manifest(StoreKey(tuple(sources), layout), lay_out(bundles))
    back = decode(encode(manifest), PATH)
    assert back == manifest
    assert [source.folder for source in back.key.sources] == [source.folder for source in sources]


def forged(**changes: object) -> bytes:
    """A manifest with other values under a right checksum."""
    document = json.loads(encode(MANIFEST))
    document.pop("xxh3")
    document.update(changes)
    text = json.dumps(document, separators=(",", ":")).encode() + b"\n"
    document["xxh3"] = xxhash.xxh3_64_intdigest(text)
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "damaged"),
        (b"[]", "damaged"),
        (b"\xff\xfe", "damaged"),
        (b"[" * 100_000, "damaged"),
        (b"{}", "'format' is missing"),
        (encode(MANIFEST)[:-1], "not as it was written"),
        (encode(MANIFEST).replace(b'"layout"', b'"loyout"', 1), "checksum is wrong"),
        (forged(format=2), "format 2 is not supported, 1 is"),
        (forged(format="1"), "damaged"),
        (forged(codec="zstd"), "codec 'zstd' is not known"),
        (forged(layout=7), "names no sources, or no layout"),
        (forged(data_bytes=1), "not as it was written"),
        (forged(sources=[["a", "b", 1, 2]]), "is not a SourceIdentity"),
        (forged(bundles=[["a", 0, 1.5, 3]]), "is not a Bundle"),
        (forged(bundles=[["a", 4096, 5, 3]]), "do not lie one after another"),
        (forged(bundles=[["a", 0, 5, 3], ["a", 4096, 5, 3]]), "two bundles have the same name"),
        (forged(bundles=[["a", 0, -5, 3]], data_bytes=0), "bundle 'a' of -5 bytes"),
        (forged(sources=[]), "names no sources"),
        (forged(extra=1), "not as it was written"),
    ],
)
def test_anything_else_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(ModelFormatError, match=rf"^manifest.json: .*({message})"):
        decode(text, PATH)


def test_two_bundles_of_one_name_cannot_be_laid_out() -> None:
    with pytest.raises(ValueError, match="same name"):
        lay_out([("a", 1), ("a", 2)])
