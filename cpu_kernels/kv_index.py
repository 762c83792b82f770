"""What the keys of the KV cache lie between, in a tree: the abstracts by which sparse reading chooses what to read.

A leaf is 16 tokens of a KV head; its abstract is every channel's least and greatest key (Quest, arXiv:2406.10774). The
tree is binary with every fourth level kept: a node spans 16 of the level below, whose abstracts lie together as a
*group* and are read as vectors across nodes. A group is (key_length, 16) maxima in float16, rounded up, then widths as
the 8 bits below float16's sign, rounded up: a node's least is its greatest less the width, so that what is told always
holds what there is, a node's all that its own hold. Levels end where few groups are left.

Leaves are written with the full block of 64 tokens that they lie in, nodes with the last block that they span, from
the keys as they are read again; so an abstract depends on its tokens alone, cutting a cache needs no care, and nothing
may be asked of blocks that are not full. Keys that are not finite make a bound that is not a number.
"""

from functools import cache, partial

from cpu_kernels.isa import ISA
from cpu_kernels.kv_abstracts import BLOCK_LEAVES, FAN, GROUP_BLOCKS, LEAF_TOKENS, IndexLayout, group_bytes
from cpu_kernels.kv_layout import BLOCK_TOKENS, PIECE_BLOCKS, KVMemory
from cpu_kernels.kv_read import KeyReader
from cpu_kernels.kv_types import HALF_BYTES, KVType
from cpu_kernels.program import Field, Row
from cpu_kernels.simd import F32, I8, I16, I64, Kernel, Value, is_vector, vector_type
from cpu_kernels.traced import TracedOperation, float_to_half

WIDTH_SHIFT = 7  # from a width's 8 bits to float16's


def index_row(
    memory: KVMemory, index: Field, *, heads: Field, tokens: Field, start: Field, isa: ISA | None = None
) -> Row:
    """Writes the abstracts of what tokens `start` to start + tokens - 1 have filled, at the layer's address `index`.

    `heads`: how many KV heads to do, the layout's where a block was filled; 0 leaves the row out.
    """
    layout = memory.layout
    place = IndexLayout(layout.kv_heads, layout.key_length, layout.capacity_tokens)
    operation = _operation(layout.key_type, layout.key_length, place.levels)
    args = (memory.table, index, tokens, start, place.head_bytes, place.groups[0])
    return Row("kv_index", operation.address_for(isa), heads, args)


@cache
def _operation(kind: KVType, length: int, levels: int) -> TracedOperation:
    name = f"kv_index_{kind}_{length}_{levels}"
    return TracedOperation(name, partial(_trace, kind=kind, length=length, levels=levels))


def _trace(k: Kernel, *, kind: KVType, length: int, levels: int) -> None:
    """Items: KV heads. Arguments: table, index, tokens, start, bytes of a head's abstracts, groups of leaves."""
    table, index, tokens, start, head_bytes, leaf_groups = (k.arg(number) for number in range(6))
    reader = KeyReader(k, kind, length)
    with k.loop(k.begin, k.end) as head:
        starts = level_starts(k, index + head * head_bytes, leaf_groups, length, levels)
        with k.loop(start // BLOCK_TOKENS, (start + tokens) // BLOCK_TOKENS) as block:
            piece = block // PIECE_BLOCKS
            within = head * PIECE_BLOCKS + (block - piece * PIECE_BLOCKS)
            keys = k.load(I64, table + piece * 8) + within * reader.block_bytes
            group = starts[0] + block // GROUP_BLOCKS * group_bytes(length)
            _write_leaves(k, reader, keys, group, block % GROUP_BLOCKS * BLOCK_LEAVES)
            span = GROUP_BLOCKS
            for level in range(1, levels):
                with k.when(((block + 1) % span).equals(0)):
                    node = block // span
                    below = starts[level - 1] + node * group_bytes(length)
                    _write_node(k, length, below, starts[level] + node // FAN * group_bytes(length), node % FAN)
                span *= FAN


def level_starts(k: Kernel, first: Value, leaf_groups: Value, length: int, levels: int) -> list[Value]:
    """Where every level's groups begin."""
    starts, groups = [first], leaf_groups
    for _ in range(1, levels):
        starts.append(starts[-1] + groups * group_bytes(length))
        groups = (groups + (FAN - 1)) // FAN
    return starts


def read_abstracts(k: Kernel, group: Value, channel: Value, length: int, node: int, count: int) -> tuple[Value, Value]:
    """A channel's least and greatest of `count` nodes from `node` on, as vectors."""
    top = k.half_to_float(k.load(vector_type(I16, count), group + channel * (FAN * HALF_BYTES) + node * HALF_BYTES))
    codes = k.load(vector_type(I8, count), group + channel * FAN + (length * FAN * HALF_BYTES + node))
    width = k.half_to_float(codes.extend(I16, signed=False) << WIDTH_SHIFT)
    return top - width, top


def _write_abstract(
    k: Kernel, group: Value, channel: Value, length: int, node: Value, ends: tuple[Value, Value]
) -> None:
    """The least and the greatest of a channel, of one node or of a vector of neighbors."""
    least, most = ends
    halves = float_to_half(k, most)
    up = k.select(halves < 0, halves - 1, halves + 1)  # float16 lies in order of its bits, negative ones backwards
    halves = k.select(k.half_to_float(halves) < most, up, halves)
    top = k.half_to_float(halves)
    rounded = float_to_half(k, top - least)
    code = (rounded + ((1 << WIDTH_SHIFT) - 1)) >> WIDTH_SHIFT
    held = top - k.half_to_float(code << WIDTH_SHIFT)
    code = k.select(held > least, code + 1, code)
    byte = vector_type(I8, code.type.count) if is_vector(code.type) else I8
    k.store(halves, group + (channel * FAN + node) * HALF_BYTES)
    k.store(Value(k, k.ir.trunc(code.ir, byte)), group + channel * FAN + node + length * FAN * HALF_BYTES)


def _write_leaves(k: Kernel, reader: KeyReader, keys: Value, group: Value, first: Value) -> None:
    """The four leaves of a block of keys as nodes `first` and up of their group."""
    length = reader.length
    ends = k.scratch(2 * 4 * BLOCK_LEAVES)
    tokens = list(range(0, BLOCK_TOKENS, k.lanes))

    def step_of(step: Value, dims: int) -> None:
        numbers = _numbers(k, reader, keys + step * reader.step_bytes, tokens)
        for dim in range(dims):
            channel = step * reader.kind.step_dims + dim
            found = _scaled(k, reader, keys, channel, tokens, numbers[dim])
            for leaf in range(BLOCK_LEAVES):
                own = [found[at] for at, token in enumerate(tokens) if token // LEAF_TOKENS == leaf]
                least, most = _ends(k, own)
                k.store(least, ends + 4 * leaf)
                k.store(most, ends + 4 * (BLOCK_LEAVES + leaf))
            four = vector_type(F32, BLOCK_LEAVES)
            pair = k.load(four, ends), k.load(four, ends + 4 * BLOCK_LEAVES)
            _write_abstract(k, group, channel, length, first, pair)

    steps, rest = divmod(length, reader.kind.step_dims)
    with k.loop(0, steps) as step:
        step_of(step, reader.kind.step_dims)
    if rest:
        step_of(k.int64(steps), rest)


def _numbers(k: Kernel, reader: KeyReader, step: Value, tokens: list[int]) -> list[list[Value]]:
    """For every dimension of a step the vectors that begin at `tokens`, without scales."""
    if not reader.kind.is_coded:
        return [reader.floats(step, tokens)]
    dims = []
    for pairs in reader.codes(step, tokens):
        words = [pair.bitcast(k.ints) for pair in pairs]
        dims.append([(word << 16).sar(16) for word in words])
        dims.append([word.sar(16) for word in words])
    zero = 8 if reader.kind is KVType.Q4_0 else 0
    return [[(code - zero).to_float() for code in codes] for codes in dims]


def _scaled(
    k: Kernel, reader: KeyReader, keys: Value, channel: Value, tokens: list[int], numbers: list[Value]
) -> list[Value]:
    """A channel's numbers with their scales."""
    kind, halves = reader.kind, vector_type(I16, k.lanes)
    if not kind.is_coded:
        return numbers
    if kind.has_minimum:
        scale, least = (k.load(I16, at + channel * HALF_BYTES) for at in reader.channel_scales(keys))
        scale, least = k.splat(k.half_to_float(scale)), k.splat(k.half_to_float(least))
        return [k.fma(number, scale, least) for number in numbers]
    scales = keys + kind.key_codes_bytes(reader.length) + channel // kind.key_group * (BLOCK_TOKENS * HALF_BYTES)
    found = [k.half_to_float(k.load(halves, scales + HALF_BYTES * token)) for token in tokens]
    return [number * scale for number, scale in zip(numbers, found, strict=True)]


def _write_node(k: Kernel, length: int, below: Value, group: Value, node: Value) -> None:
    """What the 16 nodes of a group lie between, as one node of the level above."""
    with k.loop(0, length) as channel:
        parts = [read_abstracts(k, below, channel, length, at, k.lanes) for at in range(0, FAN, k.lanes)]
        ends = _ends(k, [least for least, _ in parts])[0], _ends(k, [most for _, most in parts])[1]
        _write_abstract(k, group, channel, length, node, ends)


def _ends(k: Kernel, vectors: list[Value]) -> tuple[Value, Value]:
    """The least and the greatest of all elements; the greatest is no number where some element is not finite."""
    least, most, poison = vectors[0], vectors[0], vectors[0] * 0.0
    for vector in vectors[1:]:
        least, most, poison = k.minimum(least, vector), k.maximum(most, vector), poison + vector * 0.0
    return -k.max_lanes(-least), k.max_lanes(most) + k.sum_lanes(poison)
