import struct

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.kv_session_block import HEADER_BYTES, BlockSize, Fault, Refusal, chain, fault, root_digest, seal
from tests.support.kv_blocks import DIGESTS, SIZE, Rows, rows_of


def sealed(digest: bytes = DIGESTS[0], size: BlockSize = SIZE) -> Rows:
    memory = np.full(size.file_bytes, 7, np.uint8)
    memory[HEADER_BYTES : HEADER_BYTES + size.num_bytes] = rows_of(0)[: size.num_bytes]
    seal(memory, digest, size)
    return memory


def test_a_sealed_block_is_sound_and_whole_drive_blocks_long() -> None:
    memory = sealed()
    assert memory.nbytes == 3 * 4096
    assert fault(memory, DIGESTS[0], SIZE) is None


def test_ten_thousand_flipped_bits_are_all_found() -> None:
    memory = sealed()
    rng = np.random.default_rng(11)
    for position in rng.integers(0, memory.nbytes * 8, 10_000):
        memory[position // 8] ^= 1 << (position % 8)
        found = fault(memory, DIGESTS[0], SIZE)
        assert found is not None, position
        assert found.reason
        memory[position // 8] ^= 1 << (position % 8)
    assert fault(memory, DIGESTS[0], SIZE) is None


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 3 * 4096 - 1), st.integers(1, 300), st.integers(0, 255))
def test_a_run_of_bytes_that_was_overwritten_is_found(start: int, length: int, value: int) -> None:
    memory = sealed()
    before = memory.copy()
    memory[start : start + length] = value
    assert (fault(memory, DIGESTS[0], SIZE) is None) == np.array_equal(memory, before)


def test_what_belongs_to_other_tokens_models_or_sizes_is_refused() -> None:
    assert fault(sealed(), DIGESTS[1], SIZE) == Fault(
        Refusal.OTHER_ROWS, "its rows are of other tokens, or of another model"
    )
    found = fault(sealed(), DIGESTS[0], BlockSize(8, SIZE.num_bytes))
    assert found == Fault(Refusal.OTHER_ROWS, "it has 4 tokens in 5000 bytes, not 8 in 5000")


def test_a_block_of_a_newer_format_is_refused_with_its_number() -> None:
    memory = sealed()
    memory[8:12] = np.frombuffer(struct.pack("<I", 2), np.uint8)
    checksum = xxhash.xxh3_64_intdigest(memory[: HEADER_BYTES - 8].data)
    memory[HEADER_BYTES - 8 : HEADER_BYTES] = np.frombuffer(struct.pack("<Q", checksum), np.uint8)
    found = fault(memory, DIGESTS[0], SIZE)
    assert found == Fault(Refusal.OTHER_VERSION, "its format 2 is not supported, 1 is")


@pytest.mark.parametrize("tokens", [0, 3, 4, 7, 8, 18])
def test_only_whole_blocks_have_digests(tokens: int) -> None:
    ids = list(range(100, 100 + tokens))
    assert chain(root_digest("model"), ids, SIZE.tokens) == DIGESTS[: tokens // 4]


def test_a_digest_depends_on_the_model_and_on_every_token_before_its_end() -> None:
    ids = list(range(100, 116))
    assert not set(chain(root_digest("other"), ids, 4)) & set(DIGESTS)
    for changed in range(16):
        other = chain(root_digest("model"), [*ids[:changed], 5, *ids[changed + 1 :]], 4)
        same = [mine == its for mine, its in zip(DIGESTS, other, strict=True)]
        assert same == [index < changed // 4 for index in range(4)]
