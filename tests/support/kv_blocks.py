"""Small KV blocks, and folders of them."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from offload.kv_session_block import BlockSize, chain, root_digest
from offload.kv_session_folder import BlockFolder
from offload.kv_session_reader import Refused, read_blocks
from offload.store_files import FILES, Files
from offload.store_key import SourceIdentity, StoreKey

SIZE = BlockSize(4, 5000)
TOKENS = list(range(100, 118))  # four whole blocks, and two tokens
KEY = StoreKey((SourceIdentity("/models", "model.gguf", 1000, 123, 456),), "f16")
DIGESTS = chain(root_digest("model"), TOKENS, SIZE.tokens)
Rows = NDArray[np.uint8]


def rows_of(index: int) -> Rows:
    """Random rows of a block."""
    return np.random.default_rng(index).integers(0, 256, SIZE.num_bytes, np.uint8)


def filled(folder: Path, files: Files = FILES, most_bytes: int | None = None) -> BlockFolder:
    """A folder with all blocks, or as many as there was room for."""
    blocks = BlockFolder(folder, most_bytes=most_bytes, files=files)
    missing = [index for index, digest in enumerate(DIGESTS) if not blocks.has(digest)]

    def fill(number: int, out: Rows) -> None:
        out[:] = rows_of(missing[number])

    blocks.write([DIGESTS[index] for index in missing], SIZE, fill)
    return blocks


def read(blocks: BlockFolder, digests: list[bytes] = DIGESTS) -> tuple[list[int], Refused | None]:
    """The blocks that were handed over, all of which had the right rows, and the first that was refused."""
    found: list[int] = []

    def take(index: int, rows: Rows) -> None:
        assert np.array_equal(rows, rows_of(index)), index
        found.append(index)

    refused = read_blocks([(blocks.path(digest), digest) for digest in digests], SIZE, take)
    return sorted(found), refused
