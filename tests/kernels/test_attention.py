"""Norm of heads, rotary positions, KV append and attention against float64, and their identity across ways to run."""

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from cpu_kernels.attention import Attention, carried_floats, part_columns, partial_floats, pieces_of, tile_tokens
from cpu_kernels.heads import Rotation, heads_row
from cpu_kernels.isa import ISA
from cpu_kernels.kv_layout import KVLayout, KVMemory
from cpu_kernels.matrix import Matrix
from cpu_kernels.pool import Pool
from cpu_kernels.program import Parameter, Program, Row
from cpu_kernels.reference.kv_codes import unpacked_keys, unpacked_values
from tests.support.kv_chunks import scattered_chunks
from tests.support.rows import ISA_NAMES, ISAS, THREADS, address, close, floats, run

every_isa = pytest.mark.parametrize("isa", ISAS, ids=ISA_NAMES)


@dataclass(frozen=True)
class Case:
    heads: int
    kv_heads: int
    key_length: int
    value_length: int
    tokens: int
    start: int
    window: int | None = None
    softcap: float | None = None

    @property
    def scale(self) -> float:
        return self.key_length**-0.5

    def reference(self, queries: NDArray[np.float32], memory: "Memory") -> NDArray[np.float64]:
        keys, values = memory.unpacked(self.start + self.tokens)
        out = np.zeros((self.tokens, self.heads, self.value_length))
        for token in range(self.tokens):
            position = self.start + token
            seen = slice(0 if self.window is None else max(0, position - self.window + 1), position + 1)
            for head in range(self.heads):
                kv_head = head // (self.heads // self.kv_heads)
                query = queries[token].reshape(self.heads, -1)[head].astype(np.float64)
                scores = keys[kv_head, seen] @ query * self.scale
                if self.softcap is not None:
                    scores = np.tanh(scores / self.softcap) * self.softcap
                weights = np.exp(scores - scores.max())
                out[token, head] = weights / weights.sum() @ values[kv_head, seen]
        return out.reshape(self.tokens, -1)


class Memory:
    """A KV cache of NaN, so that reading what was never written is noticed."""

    def __init__(self, case: Case, extra_tokens: int = 3) -> None:
        capacity = case.start + case.tokens + extra_tokens
        self.layout = KVLayout(case.kv_heads, case.key_length, case.value_length, capacity)
        self.chunks = scattered_chunks(self.layout, np.float16(np.nan))
        self.table = np.array([address(chunk) for chunk in self.chunks], np.int64)
        self.at = KVMemory(self.layout, address(self.table))

    def unpacked(self, tokens: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        keys, values = (unpack(self.layout, self.chunks, tokens) for unpack in (unpacked_keys, unpacked_values))
        return keys.astype(np.float64), values.astype(np.float64)

    def fill(self, case: Case) -> None:
        """Gaussian keys and values for every token, put there without rotation."""
        tokens = case.start + case.tokens
        keys, values = (
            floats(1, tokens, case.kv_heads * case.key_length),
            floats(2, tokens, case.kv_heads * case.value_length),
        )
        still = (
            np.ones((tokens, case.key_length // 2), np.float32),
            np.zeros((tokens, case.key_length // 2), np.float32),
        )
        rotation = Rotation(address(still[0]), address(still[1]), case.key_length // 2, neighbours=False)
        queries = np.zeros((tokens, case.key_length), np.float32)
        run(
            heads_row(Matrix.of(queries), Matrix.of(keys), Matrix.of(values), self.at, rotation, tokens=tokens, start=0)
        )


CASES = [
    Case(8, 2, 64, 64, tokens=1, start=1100),
    Case(6, 2, 80, 48, tokens=5, start=70),
    Case(7, 1, 64, 64, tokens=3, start=600, window=100, softcap=5.0),
    Case(4, 4, 128, 128, tokens=33, start=511),
    Case(2, 1, 32, 33, tokens=70, start=0, window=7),
    Case(1, 1, 2, 1, tokens=1, start=0),
]


def attention(
    case: Case,
    out: NDArray[np.float32],
    queries: NDArray[np.float32],
    start: int,
    memory: Memory,
    isa: ISA | None = None,
    part_pieces: int | None = None,
) -> Attention:
    return Attention(
        *(Matrix.of(out), Matrix.of(queries), memory.at),
        tokens=len(queries),
        start=start,
        scale=case.scale,
        window=case.window,
        softcap=case.softcap,
        part_pieces=part_pieces,
        isa=isa,
    )


def whole(
    case: Case, queries: NDArray[np.float32], memory: Memory, isa: ISA | None, threads: int = 2
) -> NDArray[np.float32]:
    out = np.full((len(queries), case.heads * case.value_length), np.nan, np.float32)
    run(attention(case, out, queries, case.start + case.tokens - len(queries), memory, isa).row(), threads=threads)
    return out


def split(
    case: Case, queries: NDArray[np.float32], start: int, memory: Memory, isa: ISA | None = None, *, threads: int = 2
) -> NDArray[np.float32]:
    out = np.full((len(queries), case.heads * case.value_length), np.nan, np.float32)
    scratch = np.full(partial_floats(case.heads, memory.layout, len(queries)), np.nan, np.float32)
    pieces = pieces_of(start + len(queries))
    rows = attention(case, out, queries, start, memory, isa).split_rows(address(scratch), pieces)
    run(*rows, threads=threads)
    return out


@every_isa
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_and_its_identity(case: Case, isa: ISA) -> None:
    memory = Memory(case)
    memory.fill(case)
    queries = floats(0, case.tokens, case.heads * case.key_length)
    out = whole(case, queries, memory, isa)
    assert close(out, case.reference(queries, memory))
    for threads in THREADS:
        assert (whole(case, queries, memory, isa, threads) == out).all()
    for token in {0, case.tokens // 2, case.tokens - 1}:
        one = queries[token : token + 1]
        for threads in THREADS:
            assert (split(case, one, case.start + token, memory, isa, threads=threads) == out[token]).all()
    some = min(case.tokens, tile_tokens(case.heads, case.kv_heads))
    assert (split(case, queries[:some], case.start, memory, isa) == out[:some]).all()


RANGES = [
    (Case(8, 2, 64, 64, tokens=3, start=1600), [1, 3], None),
    (Case(8, 2, 64, 64, tokens=9, start=1530), [2], None),  # the first tokens end in an earlier piece than the last
    (Case(2, 1, 32, 33, tokens=40, start=1600, window=700, softcap=5.0), [1, 2, 3], None),
    (Case(2, 1, 32, 33, tokens=40, start=1600, window=700), [1, 2], 3),
    (Case(2, 1, 32, 33, tokens=3, start=1100), [1, 2], 2),  # nothing is left of the part for the last row
]


@every_isa
@pytest.mark.parametrize(("case", "cuts", "part_pieces"), RANGES, ids=str)
def test_pieces_may_come_in_ranges(case: Case, cuts: list[int], part_pieces: int | None, isa: ISA) -> None:
    memory = Memory(case)
    memory.fill(case)
    queries = floats(0, case.tokens, case.heads * case.key_length)
    columns = case.heads * case.value_length if part_pieces is None else part_columns(case.heads, case.value_length)
    one, other, few = (np.full((case.tokens, columns), np.nan, np.float32) for _ in range(3))
    run(attention(case, one, queries, case.start, memory, isa, part_pieces).row())
    ranges = attention(case, other, queries, case.start, memory, isa, part_pieces)
    carried = np.full(carried_floats(case.heads, memory.layout, case.tokens), np.nan, np.float32)
    for first, end in zip([0, *cuts], [*cuts, None], strict=True):
        run(ranges.range_row(address(carried), first, end), threads=2)
    assert (one == other).all()
    if case.tokens > tile_tokens(case.heads, case.kv_heads):
        return
    scratch = np.full(partial_floats(case.heads, memory.layout, case.tokens), np.nan, np.float32)
    split = attention(case, few, queries, case.start, memory, isa, part_pieces)
    pieces = pieces_of(case.start + case.tokens) if part_pieces is None else part_pieces
    for first, end in reversed(list(zip([0, *cuts], [*cuts, pieces], strict=True))):
        run(split.pieces_row(address(scratch), first, end), threads=3)
    run(split.merge_row(address(scratch), pieces))
    assert (one == few).all()


def part(
    case: Case, queries: NDArray[np.float32], memory: Memory, pieces: int, isa: ISA | None, *, shares: bool
) -> NDArray[np.float32]:
    """What is told of the first pieces, by either way of sharing the work out."""
    start = case.start + case.tokens - len(queries)
    out = np.full((len(queries), part_columns(case.heads, case.value_length)), np.nan, np.float32)
    scratch = np.full(partial_floats(case.heads, memory.layout, len(queries)), np.nan, np.float32)
    told = attention(case, out, queries, start, memory, isa, pieces)
    run(*(told.split_rows(address(scratch), pieces) if shares else [told.row()]))
    return out


PARTS = [
    (Case(8, 2, 64, 64, tokens=1, start=1100), 2),
    (Case(8, 2, 64, 64, tokens=1, start=1100), 0),
    (Case(7, 1, 64, 64, tokens=3, start=600, window=100, softcap=5.0), 1),
    (Case(7, 1, 64, 64, tokens=3, start=700, window=100), 1),  # all of the part is out of sight
    (Case(2, 1, 32, 33, tokens=70, start=1024, window=550), 2),
]


@every_isa
@pytest.mark.parametrize(("case", "pieces"), PARTS, ids=str)
def test_a_part_and_the_rest_are_the_whole(case: Case, pieces: int, isa: ISA) -> None:
    memory = Memory(case)
    memory.fill(case)
    queries = floats(0, case.tokens, case.heads * case.key_length)
    found = part(case, queries, memory, pieces, isa, shares=False)
    few = min(case.tokens, tile_tokens(case.heads, case.kv_heads))
    last = queries[-few:]
    assert (
        part(case, last, memory, pieces, isa, shares=True) == part(case, last, memory, pieces, isa, shares=False)
    ).all()
    columns = case.heads * case.value_length
    told = found[:, :columns].reshape(case.tokens, case.heads, -1).astype(np.float64)
    greatest, sums = np.split(found[:, columns:].astype(np.float64), 2, axis=1)
    wanted = np.zeros_like(told)
    keys, values = memory.unpacked(case.start + case.tokens)
    for token in range(case.tokens):
        position = case.start + token
        first = 0 if case.window is None else max(0, position - case.window + 1)
        for head in range(case.heads):
            kv_head = head // (case.heads // case.kv_heads)
            scores = keys[kv_head, first : position + 1] @ queries[token].reshape(case.heads, -1)[head] * case.scale
            scores = scores if case.softcap is None else np.tanh(scores / case.softcap) * case.softcap
            rest = slice(max(pieces * 512 - first, 0), None)
            peak = max(scores[rest].max(), greatest[token, head])
            weights = np.exp(scores[rest] - peak)
            seen = sums[token, head] * np.exp(greatest[token, head] - peak)
            others = weights @ values[kv_head, first : position + 1][rest]
            wanted[token, head] = (told[token, head] * seen + others) / (seen + weights.sum())
    assert close(wanted.reshape(case.tokens, -1), case.reference(queries, memory))
    if not pieces or (case.window is not None and case.start - case.window >= pieces * 512):
        assert (sums == 0).all()
        assert (told == 0).all()


def test_a_token_too_many_or_too_few_is_noticed() -> None:
    case = Case(2, 1, 32, 32, tokens=1, start=600, window=500)
    memory = Memory(case)
    memory.fill(case)
    queries = floats(0, 1, 64)
    out = whole(case, queries, memory, None)
    assert close(out, case.reference(queries, memory))
    for window in (499, 501):
        wrong = Case(2, 1, 32, 32, tokens=1, start=600, window=window)
        assert not close(out, wrong.reference(queries, memory))


def test_a_program_grows_with_its_sequence() -> None:
    case = Case(4, 2, 32, 32, tokens=1, start=1030)
    memory = Memory(case)
    memory.fill(case)
    queries = floats(0, 1, 128)
    out = np.zeros((1, 128), np.float32)
    scratch = np.zeros(partial_floats(4, memory.layout, 1), np.float32)
    rows = Attention(
        *(Matrix.of(out), Matrix.of(queries), memory.at), tokens=1, start=Parameter("start"), scale=case.scale
    ).split_rows(address(scratch), Parameter("start", offset=1, divisor=512))
    program = Program(rows)
    with Pool(2) as pool:
        for start in (0, 63, 511, 512, 1030):
            program.set("start", start)
            pool.run(program)
            assert (out == split(case, queries, start, memory)).all()


@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("lengths", [(64, 64, 32), (80, 48, 20), (6, 5, 3), (128, 128, 17)], ids=str)
@every_isa
def test_heads(isa: ISA, lengths: tuple[int, int, int], normed: bool, neighbours: bool) -> None:
    length, value_length, pairs = lengths
    tokens, start, heads, kv_heads = 5, 62, 6, 2
    case = Case(heads, kv_heads, length, value_length, tokens, start)
    memory = Memory(case)
    queries, keys = floats(0, tokens, heads * length), floats(1, tokens, kv_heads * length)
    values = floats(2, tokens, kv_heads * value_length)
    query_norm, key_norm = floats(3, length), floats(4, length)
    angles = np.random.default_rng(5).uniform(-3, 3, (start + tokens, pairs))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def expected(x: NDArray[np.float32], weight: NDArray[np.float32], swap: bool) -> NDArray[np.float64]:
        wide = x.reshape(tokens, -1, length).astype(np.float64)
        if normed:
            wide = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * weight
        first, second = (
            (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)) if swap else (slice(pairs), slice(pairs, 2 * pairs))
        )
        c, s = np.cos(angles)[start:, None], np.sin(angles)[start:, None]
        turned = wide.copy()
        turned[..., first] = wide[..., first] * c - wide[..., second] * s
        turned[..., second] = wide[..., first] * s + wide[..., second] * c
        return turned

    wanted_queries, wrong = (
        expected(queries, query_norm, order).reshape(tokens, -1) for order in (neighbours, not neighbours)
    )
    wanted_keys = expected(keys, key_norm, neighbours).transpose(1, 0, 2)
    row = heads_row(
        Matrix.of(queries),
        Matrix.of(keys),
        Matrix.of(values),
        memory.at,
        Rotation(address(cos), address(sin), pairs, neighbours),
        tokens=tokens,
        start=start,
        query_norm=address(query_norm) if normed else None,
        key_norm=address(key_norm) if normed else None,
        eps=1e-6,
        isa=isa,
    )
    run(row, threads=3)
    assert close(queries, wanted_queries)
    assert not close(queries, wrong)
    stored_keys, stored_values = memory.unpacked(start + tokens)
    assert close(stored_keys[:, start:], wanted_keys, 2.0**-11)
    assert (
        stored_values[:, start:] == values.reshape(tokens, kv_heads, -1).transpose(1, 0, 2).astype(np.float16)
    ).all()
    assert np.isnan(stored_keys[:, :start]).all(), "only the new tokens were written"
    assert np.isnan(memory.unpacked(memory.layout.capacity_tokens)[1][:, start + tokens :]).all()


@every_isa
def test_halves_are_rounded_to_nearest(isa: ISA) -> None:
    numbers = np.array(
        [
            0,
            -0.0,
            1,
            -1,
            2049,
            2051,
            65504,
            65519.9,
            65520,
            1e9,
            -1e9,
            2e-8,
            3e-8,
            8.9e-8,
            6.1e-5,
            6.09e-5,
            np.inf,
            np.nan,
        ],
        np.float32,
    )
    numbers = np.concatenate([numbers, floats(0, 1000), floats(1, 1000, scale=1e-5)])
    length = len(numbers)
    case = Case(1, 1, 2, length, 1, 0)
    memory = Memory(case)
    ones, query, key = np.ones((1, 1), np.float32), np.zeros((1, 2), np.float32), np.zeros((1, 2), np.float32)
    row = heads_row(
        Matrix.of(query),
        Matrix.of(key),
        Matrix.of(numbers[None]),
        memory.at,
        Rotation(address(ones), address(ones), 1, neighbours=True),
        tokens=1,
        start=0,
        isa=isa,
    )
    run(row)
    with np.errstate(over="ignore"):
        expected = numbers.astype(np.float16)
    np.testing.assert_array_equal(memory.unpacked(1)[1][0, 0].astype(np.float16), expected)


def test_wrong_shapes_are_refused() -> None:
    memory = Memory(Case(4, 2, 8, 8, 1, 0))
    rotation = Rotation(0, 0, 4, neighbours=True)
    queries, keys, narrow = Matrix(0, 32, 32), Matrix(0, 16, 16), Matrix(0, 8, 8)

    def heads(*matrices: Matrix, **changed: int) -> Row:
        return heads_row(*matrices, memory.at, rotation, tokens=1, start=0, **changed)

    with pytest.raises(ValueError, match="8 key columns"):
        heads(queries, narrow, keys)
    with pytest.raises(ValueError, match="8 value columns"):
        heads(queries, keys, narrow)
    with pytest.raises(ValueError, match="both normed, or neither"):
        heads(queries, keys, keys, query_norm=1)
    with pytest.raises(ValueError, match="5 pairs turn in heads of 8"):
        heads_row(queries, keys, keys, memory.at, Rotation(0, 0, 5, neighbours=True), tokens=1, start=0)
    with pytest.raises(ValueError, match="8 output columns"):
        Attention(narrow, queries, memory.at, tokens=1, start=0, scale=1.0)
    with pytest.raises(ValueError, match="window of 0"):
        Attention(queries, queries, memory.at, tokens=1, start=0, scale=1.0, window=0)
    with pytest.raises(ValueError, match="attention of 17 tokens by pieces; a tile holds 16"):
        Attention(queries, queries, memory.at, tokens=17, start=0, scale=1.0).pieces_row(0, 0, 1)
    with pytest.raises(ValueError, match="3 heads share 2"):
        tile_tokens(3, 2)
    with pytest.raises(ValueError, match="at least 1"):
        KVLayout(1, 0, 1, 1)
