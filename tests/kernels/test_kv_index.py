"""The tree of abstracts over keys: bounds that hold for every type and step; the choice against brute force."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cpu_kernels.heads import Rotation, code_keys_row, heads_row
from cpu_kernels.isa import ISA
from cpu_kernels.kv_abstracts import BLOCK_LEAVES, FAN, LEAF_TOKENS, IndexLayout, abstract_bytes
from cpu_kernels.kv_index import index_row
from cpu_kernels.kv_layout import BLOCK_TOKENS, KVLayout, KVMemory
from cpu_kernels.kv_select import (
    COUNTS,
    KEPT_BLOCKS,
    READ_MOST,
    RECENT_BLOCKS,
    Selection,
    chosen_bytes,
    scratch_bytes,
    select_row,
)
from cpu_kernels.kv_types import KVType
from cpu_kernels.matrix import Matrix
from tests.support.kv_chunks import scattered_chunks
from tests.support.rows import ISA_NAMES, ISAS, address, floats, run

every_isa = pytest.mark.parametrize("isa", ISAS, ids=ISA_NAMES)
Floats = NDArray[np.float32]


class Indexed:
    """Keys of a layer in chunks, and their abstracts, whose memory held nonsense."""

    def __init__(self, keys: Floats, *, kind: KVType = KVType.F16, capacity: int | None = None) -> None:
        """`keys`: (tokens, kv_heads, key_length), put there as a model's."""
        self.tokens, kv_heads, length = keys.shape
        self.layout = KVLayout(kv_heads, length, 1, capacity or self.tokens, key_type=kind)
        self.chunks = scattered_chunks(self.layout, np.uint8(0xFF))
        self.table = np.array([address(chunk) for chunk in self.chunks], np.int64)
        self.window = np.full(max(self.layout.window_bytes, 64), 0xFF, np.uint8)
        self.memory = KVMemory(self.layout, address(self.table), address(self.window))
        self.place = IndexLayout(kv_heads, length, self.layout.capacity_tokens)
        self.index = np.full(self.place.num_bytes, 0xFF, np.uint8)
        self.keys = keys

    def append(self, first: int, count: int, isa: ISA | None = None) -> None:
        """Tokens from `first` on, and their abstracts."""
        kv_heads, length = self.layout.kv_heads, self.layout.key_length
        pairs = length // 2
        still = np.ones((self.tokens, pairs), np.float32), np.zeros((self.tokens, pairs), np.float32)
        keys = np.ascontiguousarray(self.keys[first : first + count]).reshape(count, -1)
        queries, values = np.zeros((count, kv_heads * length), np.float32), np.zeros((count, kv_heads), np.float32)
        rotation = Rotation(address(still[0]), address(still[1]), pairs, neighbours=False)
        step = {"tokens": count, "start": first, "isa": isa}
        rows = [heads_row(*(Matrix.of(part) for part in (queries, keys, values)), self.memory, rotation, **step)]
        if self.layout.has_window:
            rows.append(code_keys_row(self.memory, **step))
        run(*rows, index_row(self.memory, address(self.index), heads=kv_heads, **step), threads=2)

    def ends(self, head: int, level: int, nodes: int) -> tuple[Floats, Floats]:
        """(nodes, key_length) least and greatest of a level's first nodes."""
        length, place = self.layout.key_length, self.place
        start = head * place.head_bytes + sum(place.groups[:level]) * place.group_bytes
        groups = self.index[start:][: place.groups[level] * place.group_bytes].reshape(-1, place.group_bytes)
        tops = np.ascontiguousarray(groups[:, : 32 * length]).view(np.float16).reshape(-1, length, FAN)
        codes = groups[:, 32 * length : 48 * length].reshape(-1, length, FAN).astype(np.uint16)
        most = tops.astype(np.float32)
        least = most - (codes << 7).view(np.float16).astype(np.float32)
        return tuple(part.transpose(0, 2, 1).reshape(-1, length)[:nodes] for part in (least, most))


@dataclass(frozen=True)
class Choice:
    blocks: NDArray[np.bool_]  # (tokens, kv_heads, blocks)
    counts: NDArray[np.int64]  # (kv_heads, COUNTS)


def select(indexed: Indexed, queries: Floats, start: int, budget: int, isa: ISA | None = None) -> Choice:
    """The row's choice for queries (tokens, heads * key_length)."""
    layout, tokens = indexed.layout, len(queries)
    chosen = np.full(tokens * chosen_bytes(layout), 0xFF, np.uint8)
    counts = np.zeros((layout.kv_heads, COUNTS), np.int64)
    scratch = np.full(scratch_bytes(layout) + 64, 0xFF, np.uint8)
    places = Selection(address(indexed.index), address(chosen), address(counts), address(scratch), budget)
    run(select_row(Matrix.of(queries), layout, places, tokens=tokens, start=start, isa=isa), threads=2)
    assert (scratch[-64:] == 0xFF).all()
    blocks = -(-(start + tokens) // BLOCK_TOKENS)
    return Choice(chosen.reshape(tokens, layout.kv_heads, -1)[:, :, :blocks] == 1, counts)


def expected(indexed: Indexed, queries: Floats, start: int, budget: int) -> NDArray[np.bool_]:
    """By the bounds of all leaves, worked out in float64."""
    layout, tokens = indexed.layout, len(queries)
    out = np.zeros((tokens, layout.kv_heads, -(-(start + tokens) // BLOCK_TOKENS)), bool)
    for token in range(tokens):
        own = (start + token) // BLOCK_TOKENS
        recent = max(own - RECENT_BLOCKS, 1)
        for head in range(layout.kv_heads):
            if own < budget // BLOCK_TOKENS:
                out[token, head] = True
                continue
            out[token, head, [0, *range(recent, own + 1)]] = True
            bounds = leaf_bounds(indexed, queries[token], head, recent * BLOCK_LEAVES)
            order = sorted(range(BLOCK_LEAVES, len(bounds)), key=lambda leaf: (-bounds[leaf], leaf))
            leaves = order[: budget // LEAF_TOKENS - KEPT_BLOCKS * BLOCK_LEAVES]
            blocks = list(dict.fromkeys(leaf // BLOCK_LEAVES for leaf in leaves))
            out[token, head, blocks[: READ_MOST * (budget // BLOCK_TOKENS) - KEPT_BLOCKS]] = True
    return out


def leaf_bounds(indexed: Indexed, queries: Floats, head: int, leaves: int) -> NDArray[np.float64]:
    """Of the first leaves for one token's queries of a KV head."""
    layout = indexed.layout
    group = queries.astype(np.float64).reshape(layout.kv_heads, -1, layout.key_length)[head]
    least, most = (part.astype(np.float64) for part in indexed.ends(head, 0, leaves))
    return np.max([np.maximum(query * least, query * most).sum(1) for query in group], axis=0)


@pytest.mark.parametrize("kind", list(KVType))
@pytest.mark.parametrize("length", [64, 80, 10])
def test_abstracts_hold_what_they_span_and_not_much_more(kind: KVType, length: int) -> None:
    keys = floats(1, 5000, 2, length) + 50.0 * (np.arange(length) == 3)
    indexed = Indexed(keys.astype(np.float32), kind=kind, capacity=8192)
    for first in range(0, 5000, 700):
        indexed.append(first, min(700, 5000 - first))
    # 8-bit scales of 32 channels share an outlier's; four and two bits round far: the bound is of what is read
    margin = {"f16": 0.001, "bf16": 0.01, "q8_0": 0.4}.get(kind.value)
    blocks = 5000 // BLOCK_TOKENS
    for head in range(2):
        for level, span in enumerate((1, FAN)):
            nodes = blocks * BLOCK_LEAVES // span
            least, most = indexed.ends(head, level, nodes)
            own = keys[: nodes * span * LEAF_TOKENS, head].reshape(nodes, -1, length)
            assert np.isfinite(least).all()
            assert np.isfinite(most).all()
            if margin is not None:
                allowed = margin * (1 + np.abs(own).max(1))
                assert (own.max(1) <= most + allowed).all()
                assert (own.min(1) >= least - allowed).all()
                assert (most - own.max(1) <= 2 * allowed).all()
                assert (own.min(1) - least <= 2 * allowed + 0.2 * (1 + level) * np.ptp(own, axis=1) + 0.1).all()
    leaves, nodes = indexed.ends(0, 0, 16 * FAN), indexed.ends(0, 1, 16)
    assert (leaves[0].reshape(16, FAN, length).min(1) >= nodes[0]).all()
    assert (leaves[1].reshape(16, FAN, length).max(1) <= nodes[1]).all()


@every_isa
def test_float16_keys_lie_within_their_leaves(isa: ISA) -> None:
    keys = floats(2, 512, 1, 12, scale=3.0)
    keys[5, 0, :4] = [6e-8, -6e-8, 60000.0, -60000.0]
    indexed = Indexed(keys)
    indexed.append(0, 512, isa)
    least, most = indexed.ends(0, 0, 32)
    held = keys.astype(np.float16).astype(np.float32).reshape(32, LEAF_TOKENS, 12)
    assert (held.max(1) == most).all()
    assert (held.min(1) >= least).all()


def test_abstracts_take_a_sixteenth_of_the_keys_and_values() -> None:
    for length in (8, 64, 80, 128):
        for capacity in (1024, 4096, 16384, 131072):
            place = IndexLayout(1, length, capacity)
            assert place.num_bytes <= capacity * 2 * length * 2 / 16
    assert abstract_bytes(3, 64) * 16384 >= IndexLayout(3, 64, 16384).num_bytes


@pytest.mark.parametrize("steps", [[4300], [1, 63, 64, 200, 3972], [4000, -60, 360], [4200, -2000, 2100]])
def test_abstracts_depend_on_tokens_alone(steps: Sequence[int]) -> None:
    """However tokens came, and though some were taken back (negative steps) after others had followed them."""
    keys = floats(3, 4300, 1, 16)
    indexed, whole = Indexed(keys), Indexed(keys)
    whole.append(0, 4300)
    place = 0
    for step in steps:
        if step > 0:
            indexed.append(place, step)
        else:  # others came in their place
            indexed.keys = np.concatenate([keys[: place + step], floats(4, -step, 1, 16) * 9])
            indexed.append(place + step, -step)
            indexed.keys = keys
        place += step
    full = min(place, 4300) // BLOCK_TOKENS * BLOCK_LEAVES
    for level, nodes in ((0, full), (1, full // FAN)):
        for found, wanted in zip(indexed.ends(0, level, nodes), whole.ends(0, level, nodes), strict=True):
            assert (found == wanted).all()


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_the_choice_is_of_the_leaves_with_the_greatest_bounds(data: st.DataObject) -> None:
    """Small integers, so that sums are exact and many bounds are equal."""
    length, kv_heads = data.draw(st.sampled_from([2, 6, 8])), data.draw(st.sampled_from([1, 2]))
    group, tokens = data.draw(st.sampled_from([1, 2, 3])), data.draw(st.integers(1, 3))
    start = data.draw(st.sampled_from([0, 63, 255, 256, 320, 1023, 1700, 4095, 4500]))
    capacity = data.draw(st.sampled_from([start + tokens, 8192]))
    random = np.random.default_rng(data.draw(st.integers(0, 1 << 20)))
    spread = data.draw(st.sampled_from([1, 3, 8]))
    keys = random.integers(-spread, spread + 1, (start + tokens, kv_heads, length)).astype(np.float32)
    budget = 64 * data.draw(st.integers(4, 20))
    indexed = Indexed(keys, capacity=capacity)
    indexed.append(0, start + tokens)
    queries = random.integers(-3, 4, (tokens, kv_heads * group * length)).astype(np.float32)
    found = select(indexed, queries, start, budget)
    assert (found.blocks == expected(indexed, queries, start, budget)).all()
    if tokens == 1:
        assert (found.counts[:, 2] == found.blocks[0].sum(1)).all()


@every_isa
def test_choices_of_all_instruction_sets_at_depth(isa: ISA) -> None:
    keys = np.random.default_rng(5).integers(-4, 5, (70000, 1, 8)).astype(np.float32)
    indexed = Indexed(keys)
    indexed.append(0, 70000, isa)
    queries = np.random.default_rng(6).integers(-3, 4, (2, 9 * 8)).astype(np.float32)
    found = select(indexed, queries, 69990, 1024, isa)
    assert (found.blocks == expected(indexed, queries, 69990, 1024)).all()
    assert indexed.place.levels == 3


def test_a_token_chooses_alone() -> None:
    keys, queries = floats(7, 3000, 2, 16), floats(8, 5, 4 * 16)
    indexed = Indexed(keys)
    indexed.append(0, 3000)
    together = select(indexed, queries, 2878, 512)  # across the end of a block
    for token in range(5):
        alone = select(indexed, queries[token : token + 1], 2878 + token, 512)
        blocks = alone.blocks.shape[2]
        assert (together.blocks[token, :, :blocks] == alone.blocks[0]).all()
        assert not together.blocks[token, :, blocks:].any()


def test_few_bounds_are_evaluated_where_attention_is_skewed() -> None:
    """Topics: keys of neighboring tokens are alike, and the queries are after one of them."""
    random = np.random.default_rng(9)
    topics = random.standard_normal((64, 1, 1, 64)) * 2
    keys = (topics + 0.3 * random.standard_normal((64, 256, 1, 64))).reshape(16384, 1, 64).astype(np.float32)
    indexed = Indexed(keys)
    indexed.append(0, 16384)
    queries = np.ascontiguousarray(topics[[5]].reshape(1, 64), np.float32)
    found = select(indexed, queries, 16383, 1024)
    assert found.blocks[0, 0, 20:24].all()
    evaluated, leaves, read, blocks = found.counts[0]
    assert (leaves, blocks) == (254 * BLOCK_LEAVES, 256)
    assert read <= 32
    assert evaluated < 0.45 * leaves


def test_damage_is_chosen() -> None:
    keys = floats(10, 2048, 1, 16)
    keys[1000, 0, 3] = np.nan
    keys[1500, 0, 5] = np.inf
    indexed = Indexed(keys)
    indexed.append(0, 2048)
    found = select(indexed, floats(11, 1, 16), 2047, 512)
    assert found.blocks[0, 0, [1000 // 64, 1500 // 64]].all()


def test_what_does_not_fit_is_refused() -> None:
    layout = KVLayout(2, 16, 16, 512)
    places = Selection(0, 0, 0, 0, 256)
    with pytest.raises(ValueError, match="query columns"):
        select_row(Matrix(0, 24, 24), layout, places, tokens=1, start=0)
    with pytest.raises(ValueError, match="budget of 255"):
        select_row(Matrix(0, 32, 32), layout, Selection(0, 0, 0, 0, 255), tokens=1, start=0)
