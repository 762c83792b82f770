"""A block of KV rows as a file: a header of one drive block, then the rows, every byte under a checksum.

Blocks are named by what they were computed from: a digest of the model's key and of all tokens up to the block's last
one. So a block that has the right name holds the right rows. Knows nothing about what rows look like.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import xxhash
from numpy.typing import NDArray

from offload.store_files import BLOCK_BYTES

FORMAT_VERSION = 1
HEADER_BYTES = BLOCK_BYTES
DIGEST_BYTES = 16
_MAGIC = b"STRATAKV"
_HEADER = struct.Struct(
    f"<8sIIQ{DIGEST_BYTES}sQ"
)  # magic, version, tokens, bytes of rows, digest, checksum of the rows
_CHECKSUM = struct.Struct("<Q")  # of the header, at its end


@dataclass(frozen=True, slots=True)
class BlockSize:
    """Tokens of a block, and bytes of its rows."""

    tokens: int
    num_bytes: int

    @property
    def file_bytes(self) -> int:
        """Bytes of its file: whole blocks of the drive."""
        return HEADER_BYTES + -(-self.num_bytes // BLOCK_BYTES) * BLOCK_BYTES


class Refusal(StrEnum):
    """Why the rows of a block are not used."""

    UNREADABLE = "unreadable"
    DAMAGED = "damaged"
    OTHER_VERSION = "other version"
    OTHER_ROWS = "other rows"


@dataclass(frozen=True, slots=True)
class Fault:
    """Something wrong with a block, in words too."""

    refusal: Refusal
    reason: str


def root_digest(key: str) -> bytes:
    """Stands for an empty sequence of the model, rows and settings that `key` tells."""
    return _digest(f"{FORMAT_VERSION} {key}".encode())


def chain(root: bytes, token_ids: Sequence[int], block_tokens: int) -> list[bytes]:
    """The digests of the whole blocks of a sequence, in order."""
    ids = np.asarray(token_ids, "<i4")
    digests = [root]
    for first in range(0, len(ids) - block_tokens + 1, block_tokens):
        digests.append(_digest(digests[-1] + ids[first : first + block_tokens].tobytes()))
    return digests[1:]


def seal(memory: NDArray[np.uint8], digest: bytes, size: BlockSize) -> None:
    """Makes a file of `memory`, (file_bytes,), in which the rows lie behind the header already."""
    memory[HEADER_BYTES + size.num_bytes :] = 0
    checksum = xxhash.xxh3_64_intdigest(memory[HEADER_BYTES:].data)
    header = _HEADER.pack(_MAGIC, FORMAT_VERSION, size.tokens, size.num_bytes, digest, checksum)
    header = header.ljust(HEADER_BYTES - _CHECKSUM.size, b"\0")
    header += _CHECKSUM.pack(xxhash.xxh3_64_intdigest(header))
    memory[:HEADER_BYTES] = np.frombuffer(header, np.uint8)


def fault(memory: NDArray[np.uint8], digest: bytes, size: BlockSize) -> Fault | None:
    """What is wrong with a file's bytes, (file_bytes,); None: they are the rows that the digest stands for."""
    header, sealed = _split(memory[:HEADER_BYTES].tobytes())
    magic, version, tokens, num_bytes, its_digest, checksum = _HEADER.unpack_from(header)
    if magic != _MAGIC:
        return Fault(Refusal.DAMAGED, "it is no block of KV")
    if sealed != xxhash.xxh3_64_intdigest(header):
        return Fault(Refusal.DAMAGED, "the checksum of its header is wrong")
    if version != FORMAT_VERSION:
        return Fault(Refusal.OTHER_VERSION, f"its format {version} is not supported, {FORMAT_VERSION} is")
    if (tokens, num_bytes) != (size.tokens, size.num_bytes):
        wanted = f"not {size.tokens} in {size.num_bytes}"
        return Fault(Refusal.OTHER_ROWS, f"it has {tokens} tokens in {num_bytes} bytes, {wanted}")
    if its_digest != digest:
        return Fault(Refusal.OTHER_ROWS, "its rows are of other tokens, or of another model")
    if xxhash.xxh3_64_intdigest(memory[HEADER_BYTES:].data) != checksum:
        return Fault(Refusal.DAMAGED, "the checksum of its rows is wrong")
    return None


def _split(header: bytes) -> tuple[bytes, int]:
    """The header without its checksum, and that."""
    checksum: int = _CHECKSUM.unpack(header[-_CHECKSUM.size :])[0]
    return header[: -_CHECKSUM.size], checksum


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()
