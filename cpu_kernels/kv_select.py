"""Chooses the blocks of the KV cache that a token reads under a budget: those of the leaves whose bound is greatest.

No key of a node has a greater product with a query than sum(max(q_d least_d, q_d greatest_d)), the node's bound; that
of a group of queries is the greatest of its heads'. A node's bound is never below that of what it spans, to the last
bit, as abstracts hold those below them and every sum runs in one order. So the search goes best first: it opens the
node of the greatest bound, or takes it if it is a leaf, until the budget is spent: what it takes is exactly the leaves
of the greatest bounds, the first of equals.

What is taken is read with the rest of its block of 64 tokens; the search ends early where a leaf would need one more
block than the budget has twice. The first block, a token's own and `RECENT_BLOCKS` before that are always read; the
choice is among the others, all of them full. A token's choice depends on its queries and on the tokens up to it. It is
told as a byte for every block, eight in a piece: 0, or 1 for those that are read.
"""

from dataclasses import dataclass
from functools import cache, partial, reduce
from typing import Any

from cpu_kernels.isa import ISA
from cpu_kernels.kv_abstracts import BLOCK_LEAVES, FAN, GROUP_BLOCKS, IndexLayout, group_bytes
from cpu_kernels.kv_index import level_starts, read_abstracts
from cpu_kernels.kv_layout import BLOCK_TOKENS, PIECE_BLOCKS, PIECE_TOKENS, KVLayout
from cpu_kernels.kv_policy import LEAST_BUDGET_TOKENS, READ_MOST
from cpu_kernels.matrix import AnyMatrix
from cpu_kernels.program import Field, Row
from cpu_kernels.simd import F32, I8, I32, I64, Kernel, Value, vector_type
from cpu_kernels.traced import TracedOperation

RECENT_BLOCKS = 1
KEPT_BLOCKS = RECENT_BLOCKS + 2  # that are always read
QUERIES_AT_ONCE = 8
NOTHING, ANYTHING = -3.0e38, 3.0e38
EVERY_BLOCK = 0x0101010101010101
COUNTS = 4  # int64 of a head: bounds evaluated, leaves to choose from, blocks read, blocks there are


@dataclass(frozen=True, slots=True)
class Selection:
    """Where a layer's choice is made: abstracts, the choice, counters, and memory to work in; addresses.

    `chosen`: `chosen_bytes` for every token; `counts`: COUNTS int64 for every KV head, which are added to; `scratch`:
    `scratch_bytes`.
    """

    index: Field
    chosen: int
    counts: Field
    scratch: int
    budget_tokens: int


def chosen_bytes(layout: KVLayout) -> int:
    """Bytes of one token's choice."""
    return layout.kv_heads * layout.pieces * PIECE_BLOCKS


def scratch_bytes(layout: KVLayout) -> int:
    """Bytes that a choice is worked out in."""
    return layout.kv_heads * _head_scratch(_place(layout))


def select_row(
    queries: AnyMatrix, layout: KVLayout, selection: Selection, *, tokens: Field, start: Field, isa: ISA | None = None
) -> Row:
    """For rotated queries (tokens, heads * key_length) at positions `start` and up. An item is a KV head.

    ValueError for a budget below `LEAST_BUDGET_TOKENS`, or queries that do not fit the layout.
    """
    heads = queries.columns // layout.key_length
    if queries.columns % layout.key_length or heads % layout.kv_heads:
        raise ValueError(f"selection: {queries.columns} query columns for {layout}")
    if selection.budget_tokens < LEAST_BUDGET_TOKENS:
        raise ValueError(f"a budget of {selection.budget_tokens} tokens; at least {LEAST_BUDGET_TOKENS}")
    place = _place(layout)
    operation = _operation(layout.key_length, heads // layout.kv_heads, place.levels)
    args = (
        *(queries.address, queries.stride_bytes, selection.index, tokens, start, layout.kv_heads),
        *(selection.chosen, layout.pieces * PIECE_BLOCKS, selection.counts, selection.scratch, _head_scratch(place)),
        *(selection.budget_tokens // BLOCK_TOKENS, place.head_bytes, place.groups[0]),
    )
    return Row("kv_select", operation.address_for(isa), layout.kv_heads, args)


def _place(layout: KVLayout) -> IndexLayout:
    return IndexLayout(layout.kv_heads, layout.key_length, layout.capacity_tokens)


def _head_scratch(place: IndexLayout) -> int:
    """Entries of all levels, every leaf's bound, a mark for every group of leaves: whole cache lines."""
    spanned = place.groups[: max(place.levels - 1, 1)]
    entries = sum(-(-groups // FAN) * FAN for groups in spanned)
    return 4 * entries + 64 * -(-(4 * FAN + 1) * place.groups[0] // 64)


@cache
def _operation(length: int, group: int, levels: int) -> TracedOperation:
    return TracedOperation(
        f"kv_select_{length}_{group}_{levels}", partial(_trace, length=length, group=group, levels=levels)
    )


def _trace(k: Kernel, *, length: int, group: int, levels: int) -> None:
    """Items: KV heads; the arguments are those of `select_row`."""
    queries, stride, index, tokens, start, kv_heads, chosen, head_chosen, counts = (k.arg(at) for at in range(9))
    scratch, head_scratch, budget, head_bytes, leaf_groups = (k.arg(at) for at in range(9, 14))
    search = _Search(k, length, group, levels)
    with k.loop(k.begin, k.end) as head:
        search.at_head(index + head * head_bytes, leaf_groups, scratch + head * head_scratch)
        count = counts + head * (8 * COUNTS)
        with k.loop(0, tokens) as token:
            own = (start + token) // BLOCK_TOKENS
            recent = k.maximum(own - RECENT_BLOCKS, k.int64(1))
            choice = chosen + (token * kv_heads + head) * head_chosen
            last = (start + tokens - 1) // PIECE_TOKENS + 1
            fits = own < budget
            with k.loop(0, last) as piece:
                every, none = k.int64(EVERY_BLOCK), k.int64(0)
                k.store(k.select(fits, every, none), choice + piece * PIECE_BLOCKS)
            _count(k, count, 3, own + 1)
            with k.when(fits):
                _count(k, count, 2, own + 1)
            with k.when(own >= budget):
                k.store(k.constant(I8, 1), choice)
                with k.loop(recent, own + 1) as block:
                    k.store(k.constant(I8, 1), choice + block)
                search.begin(queries + token * stride + head * (4 * length * group), recent)
                leaves, blocks = budget * BLOCK_LEAVES, budget * READ_MOST
                search.take(choice, leaves - KEPT_BLOCKS * BLOCK_LEAVES, blocks - KEPT_BLOCKS)
                _count(k, count, 2, search.blocks.get() + KEPT_BLOCKS)
                _count(k, count, 0, search.evaluated.get())
                _count(k, count, 1, recent * BLOCK_LEAVES)


def _count(k: Kernel, counts: Value, number: int, value: Value) -> None:
    place = counts + 8 * number
    k.store(k.load(I64, place) + value, place)


class _Search:
    """The search of one KV head for one token.

    An entry stands for a node, of the highest level first: its bound while it is not opened; then, for a group of
    leaves, the greatest bound of those that are left, and NOTHING for others.
    """

    def __init__(self, k: Kernel, length: int, group: int, levels: int) -> None:
        self.k, self.length, self.group, self.levels = k, length, group, levels
        self.query_bytes = 8 * group  # of a channel: every query's positive and negative part
        self.queries = k.scratch(length * self.query_bytes)
        self.evaluated, self.blocks = k.variable(k.int64(0)), k.variable(k.int64(0))
        self.evaluate = self._evaluation()

    def at_head(self, index: Value, leaf_groups: Value, scratch: Value) -> None:
        """Turns to a head's abstracts, and to memory of its own."""
        k = self.k
        self.leaf_groups = leaf_groups
        self.starts = level_starts(k, index, leaf_groups, self.length, self.levels)
        groups = [leaf_groups]  # whose number is that of the level above's entries
        for _ in range(2, self.levels):
            groups.append((groups[-1] + (FAN - 1)) // FAN)
        self.places = [k.int64(0)]  # by level: the highest begins at 0
        for count in reversed(groups):
            self.places.insert(0, self.places[0] + (count + (FAN - 1)) // FAN * FAN)
        self.num_entries = self.places[0]
        self.entries = scratch
        self.leaves = scratch + self.num_entries * 4
        self.opened = self.leaves + leaf_groups * (4 * FAN)

    def begin(self, queries: Value, blocks: Value) -> None:
        """For a group of queries, among the first `blocks` blocks: opens what no kept node spans."""
        k = self.k
        self._split(queries)
        self.evaluated.set(k.int64(0))
        self.nodes = [blocks * BLOCK_LEAVES]
        for _ in range(1, self.levels):
            self.nodes.append(self.nodes[-1] // FAN)
        with k.loop(0, self.num_entries, k.lanes) as entry:
            k.store(k.constant(k.floats, NOTHING), self.entries + entry * 4)
        with k.loop(0, self.leaf_groups) as group:
            k.store(k.constant(I8, 0), self.opened + group)
        for level in reversed(range(self.levels)):
            spanned = k.int64(0) if level == self.levels - 1 else self.nodes[level + 1]
            with k.loop(spanned, (self.nodes[level] + (FAN - 1)) // FAN) as group:
                self._open(level, group)

    def take(self, choice: Value, leaves: Value, blocks: Value) -> None:
        """Marks the blocks of the best `leaves` leaves, of which there are more; at most `blocks` of them."""
        k = self.k
        left = k.variable(leaves)
        self.blocks.set(k.int64(0))
        with k.repeat(lambda: left.get() > 0):
            entry = self._first_most(self.entries, self.num_entries)
            group = entry - self.places[1]
            is_group = entry >= self.places[1]
            opened = k.select(is_group, k.load(I8, self.opened + k.maximum(group, k.int64(0))), k.constant(I8, 0))
            with k.when(opened > 0):
                block = self._take_leaf(group)
                left.add(-1)
                with k.when(k.load(I8, choice + block).equals(0)):
                    with k.when(self.blocks.get() < blocks):
                        k.store(k.constant(I8, 1), choice + block)
                    left.set(k.select(self.blocks.get() < blocks, left.get(), k.int64(0)))
                    self.blocks.set(k.minimum(self.blocks.get() + 1, blocks))
            for level in range(1, len(self.places)):
                within = (entry >= self.places[level]) & (entry < self.places[level - 1])
                with k.when(within & opened.equals(0)):
                    if level > 1:
                        k.store(k.constant(F32, NOTHING), self.entries + entry * 4)
                    self._open(level - 1, entry - self.places[level])

    def _take_leaf(self, group: Value) -> Value:
        """Takes the best leaf of an opened group; its block."""
        k = self.k
        leaves = self.leaves + group * (4 * FAN)
        leaf = self._first_most(leaves, k.int64(FAN))
        k.store(k.constant(F32, NOTHING), leaves + leaf * 4)
        k.store(self._most(leaves), self.entries + (self.places[1] + group) * 4)
        return group * GROUP_BLOCKS + leaf // BLOCK_LEAVES

    def _open(self, level: int, group: Value) -> None:
        """Evaluates a group of a level's nodes."""
        k = self.k
        to = self.leaves + group * (4 * FAN) if level == 0 else self.entries + (self.places[level] + group * FAN) * 4
        k.call(self.evaluate, self.starts[level] + group * group_bytes(self.length), self.queries, to)
        count = k.minimum(self.nodes[level] - group * FAN, k.int64(FAN))
        self.evaluated.add(count)
        with k.loop(count, FAN) as node:
            k.store(k.constant(F32, NOTHING), to + node * 4)
        if level > 0:
            return
        with k.when(group.equals(0)):  # the cache's first block is read in any case
            k.store(k.constant(vector_type(F32, BLOCK_LEAVES), NOTHING), to)
        k.store(k.constant(I8, 1), self.opened + group)
        k.store(self._most(to), self.entries + (self.places[1] + group) * 4)

    def _most(self, bounds: Value) -> Value:
        """The greatest of a group's."""
        k = self.k
        vectors = [k.load(k.floats, bounds + 4 * at) for at in range(0, FAN, k.lanes)]
        return k.max_lanes(reduce(k.maximum, vectors))

    def _first_most(self, numbers: Value, count: Value) -> Value:
        """The first place of the greatest of `count` float32, a multiple of 16."""
        k = self.k
        lanes = k.table(I32, range(k.lanes))
        best, place = k.variable(k.constant(k.floats, NOTHING)), k.variable(k.constant(k.ints, 0))
        with k.loop(0, count, k.lanes) as at:
            found = k.load(k.floats, numbers + at * 4)
            better = found > best.get()
            best.set(k.select(better, found, best.get()))
            place.set(k.select(better, lanes + k.splat(at.truncate(I32)), place.get()))
        most = k.splat(k.max_lanes(best.get()))
        first = k.select(best.get().equals(most), -place.get(), k.constant(k.ints, -(1 << 30)))
        return (-k.max_lanes(first)).extend(I64, signed=True)

    def _split(self, queries: Value) -> None:
        """Positive and negative parts of all queries, channel after channel."""
        k, zero = self.k, self.k.constant(F32, 0.0)
        for query in range(self.group):
            with k.loop(0, self.length) as channel:
                number = k.load(F32, queries + (channel + query * self.length) * 4)
                to = self.queries + channel * self.query_bytes + 8 * query
                k.store(k.select(number > 0.0, number, zero), to)
                k.store(k.select(number > 0.0, zero, number), to + 4)

    def _evaluation(self) -> Any:
        """A subroutine of (group, queries, out): the bounds of 16 nodes."""
        k = self.k
        with k.subroutine("bounds", 3) as (function, (group, queries, out)):
            for node in range(0, FAN, k.lanes):
                best = None
                for first in range(0, self.group, QUERIES_AT_ONCE):
                    for bound in self._bounds(group, queries, node, range(self.group)[first : first + QUERIES_AT_ONCE]):
                        best = bound if best is None else k.maximum(best, bound)
                assert best is not None, "a group has a query"
                k.store(best, out + 4 * node)
        return function

    def _bounds(self, group: Value, queries: Value, node: int, of: range) -> list[Value]:
        """Of a vector of nodes, for some queries; what is not a number becomes ANYTHING, so that damage is read."""
        k, none = self.k, self.k.constant(self.k.floats, 0.0)
        sums = [(k.variable(none), k.variable(none)) for _ in of]
        with k.loop(0, self.length) as channel:
            least, most = read_abstracts(k, group, channel, self.length, node, k.lanes)
            for query, (low, high) in zip(of, sums, strict=True):
                place = queries + channel * self.query_bytes + 8 * query
                high.set(k.fma(most, k.load_splat(F32, place), high.get()))
                low.set(k.fma(least, k.load_splat(F32, place + 4), low.get()))
        totals = [low.get() + high.get() for low, high in sums]
        return [k.select(total.equals(total), total, k.constant(k.floats, ANYTHING)) for total in totals]
