"""The KV cache's types: codes against the plain reference to the last bit, attention over them against float64."""

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from cpu_kernels.attention import Attention, partial_floats, tile_tokens
from cpu_kernels.heads import Rotation, code_keys_row, heads_row
from cpu_kernels.isa import ISA
from cpu_kernels.kv_layout import BLOCK_TOKENS, KVLayout, KVMemory, pieces_of
from cpu_kernels.kv_types import KVType
from cpu_kernels.matrix import Matrix
from cpu_kernels.reference.kv_codes import bfloat, encoded, rounded, unpacked_keys, unpacked_values, walsh_hadamard
from tests.support.kv_chunks import scattered_chunks
from tests.support.rows import ISAS, address, close, floats, run

CODED = [kind for kind in KVType if kind.is_coded]
CODED_TOLERANCE = 2e-4  # of sums a thirtieth of their terms: factors of codes have 16 bits, float16 itself has 11
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    heads: int
    kv_heads: int
    key_length: int
    value_length: int
    tokens: int  # of queries
    start: int
    window: int | None = None
    softcap: float | None = None

    @property
    def total(self) -> int:
        return self.start + self.tokens

    @property
    def scale(self) -> float:
        return self.key_length**-0.5


CASES = [
    Case(8, 2, 64, 64, tokens=9, start=1020),
    Case(3, 1, 80, 48, tokens=5, start=60, softcap=5.0),
    Case(2, 1, 8, 33, tokens=70, start=0, window=50),
]


class Filled:
    """A cache of bytes that decode to NaN or nonsense, filled with Gaussian keys and values through the kernels."""

    def __init__(self, case: Case, key_type: KVType, value_type: KVType, *, rotates: bool = False) -> None:
        self.layout = KVLayout(
            *(case.kv_heads, case.key_length, case.value_length, case.total + 3, key_type, value_type),
            rotates_keys=rotates,
            rotates_values=rotates,
        )
        self.chunks = scattered_chunks(self.layout, np.uint8(0xFF))
        self.table = np.array([address(chunk) for chunk in self.chunks], np.int64)
        self.window = np.full(max(self.layout.window_bytes, 64), 0xFF, np.uint8)
        self.memory = KVMemory(self.layout, address(self.table), address(self.window))
        self.plain_keys = floats(1, case.total, case.kv_heads * case.key_length)
        self.plain_values = floats(2, case.total, case.kv_heads * case.value_length)
        self.case = case

    def append(self, first: int, count: int, isa: ISA | None, queries: Floats | None = None) -> None:
        """Tokens from `first` on."""
        case = self.case
        pairs = case.key_length // 2
        cos, sin = np.ones((case.total, pairs), np.float32), np.zeros((case.total, pairs), np.float32)
        turned = np.zeros((count, case.heads * case.key_length), np.float32) if queries is None else queries
        keys, values = self.plain_keys[first : first + count].copy(), self.plain_values[first : first + count].copy()
        rotation = Rotation(address(cos), address(sin), pairs, neighbours=False)
        matrices = (Matrix.of(turned), Matrix.of(keys), Matrix.of(values))
        rows = [heads_row(*matrices, self.memory, rotation, tokens=count, start=first, isa=isa)]
        if self.layout.has_window:
            rows.append(code_keys_row(self.memory, tokens=count, start=first, isa=isa))
        run(*rows, threads=2)

    def expected(self) -> tuple[Floats, Floats]:
        """Keys and values, (kv_heads, tokens, length), as they should be kept; of a window's the full blocks' codes."""
        case, layout = self.case, self.layout
        keys = self.plain_keys.reshape(case.total, case.kv_heads, -1).transpose(1, 0, 2)
        values = self.plain_values.reshape(case.total, case.kv_heads, -1).transpose(1, 0, 2)
        if layout.rotates_keys:
            keys, values = walsh_hadamard(keys), walsh_hadamard(values)
        return _kept_keys(keys, layout.key_type), _kept(values, layout.value_type, layout.value_type.value_group)


def _kept(x: Floats, kind: KVType, group: int) -> Floats:
    if kind is KVType.F16:
        return x.astype(np.float16).astype(np.float32)
    return bfloat(np.ascontiguousarray(x)) if kind is KVType.BF16 else rounded(x, kind, group)


def _kept_keys(x: Floats, kind: KVType) -> Floats:
    if not kind.has_minimum:
        return _kept(x, kind, kind.key_group)
    halves = x.astype(np.float16).astype(np.float32)
    full = x.shape[1] // BLOCK_TOKENS * BLOCK_TOKENS
    channels = halves[:, :full].reshape(len(x), full // BLOCK_TOKENS, BLOCK_TOKENS, -1).swapaxes(2, 3)
    return rounded(channels, kind, BLOCK_TOKENS).swapaxes(2, 3).reshape(len(x), full, -1)


def attended(filled: Filled, queries: Floats, isa: ISA | None) -> tuple[Floats, Floats]:
    """By the row for prompts, and by those that share the context out for the first tokens."""
    case, layout = filled.case, filled.layout
    out = np.full((case.tokens, case.heads * case.value_length), np.nan, np.float32)
    options = {"scale": case.scale, "window": case.window, "softcap": case.softcap, "isa": isa, "start": case.start}
    place = (Matrix.of(queries), filled.memory)
    run(Attention(Matrix.of(out), *place, tokens=case.tokens, **options).row(), threads=2)
    few = min(case.tokens, tile_tokens(case.heads, case.kv_heads))
    other = np.full((few, out.shape[1]), np.nan, np.float32)
    scratch = np.full(partial_floats(case.heads, layout, few), np.nan, np.float32)
    split = Attention(Matrix.of(other), *place, tokens=few, **options)
    run(*split.split_rows(address(scratch), pieces_of(case.start + few)), threads=3)
    return out, other


def reference(filled: Filled, queries: Floats, keys: Floats, values: Floats) -> NDArray[np.float64]:
    """Attention in float64 over kept keys and values; own blocks' keys of a window in float16."""
    case = filled.case
    halves = filled.plain_keys.reshape(case.total, case.kv_heads, -1).transpose(1, 0, 2)
    halves = walsh_hadamard(halves) if filled.layout.rotates_keys else halves
    halves = halves.astype(np.float16).astype(np.float64)
    out = np.zeros((case.tokens, case.heads, case.value_length))
    for token in range(case.tokens):
        position = case.start + token
        first = 0 if case.window is None else max(0, position - case.window + 1)
        coded = position // BLOCK_TOKENS * BLOCK_TOKENS if filled.layout.has_window else position + 1
        for head in range(case.heads):
            of = head // (case.heads // case.kv_heads)
            seen = np.concatenate([keys[of, :coded], halves[of, coded : position + 1]])[first:].astype(np.float64)
            scores = seen @ queries[token].reshape(case.heads, -1)[head].astype(np.float64) * case.scale
            if case.softcap is not None:
                scores = np.tanh(scores / case.softcap) * case.softcap
            weights = np.exp(scores - scores.max())
            mixed = weights / weights.sum() @ values[of, first : position + 1].astype(np.float64)
            out[token, head] = walsh_hadamard(mixed.astype(np.float32)) if filled.layout.rotates_values else mixed
    return out.reshape(case.tokens, -1)


SMALL = Case(2, 1, 8, 8, tokens=70, start=0, window=50)
NARROW = ISAS[-1]  # without any instructions of its own: what differs is how long compiling takes
COMBINATIONS = [
    *((CASES[0], kind, ISAS[0]) for kind in CODED),
    *((CASES[0], kind, isa) for kind in (KVType.Q8_0, KVType.KIVI2) for isa in ISAS[1:-1]),
    *((CASES[1], kind, ISAS[len(ISAS) // 2]) for kind in CODED),
    *((CASES[2], kind, ISAS[0]) for kind in (*CODED, KVType.BF16)),
    *((SMALL, kind, NARROW) for kind in (KVType.Q4_0, KVType.KIVI2, KVType.BF16)),
]


def named(value: object) -> str:
    return value.name if isinstance(value, ISA) else str(value)


@pytest.mark.parametrize(("case", "kind", "isa"), COMBINATIONS, ids=named)
def test_codes_and_attention(case: Case, kind: KVType, isa: ISA) -> None:
    filled = Filled(case, kind, kind)
    if case.start:
        filled.append(0, case.start // 2, isa)
    queries = floats(0, case.tokens, case.heads * case.key_length)
    filled.append(case.start // 2, case.total - case.start // 2, isa)
    keys, values = filled.expected()
    np.testing.assert_array_equal(unpacked_keys(filled.layout, filled.chunks, keys.shape[1]), keys)
    np.testing.assert_array_equal(unpacked_values(filled.layout, filled.chunks, case.total), values)
    whole, split = attended(filled, queries, isa)
    wanted = reference(filled, queries, keys, values)
    tolerance = CODED_TOLERANCE if kind.is_coded else 1e-5
    assert close(whole, wanted, tolerance)
    assert (split == whole[: len(split)]).all()
    if kind.is_coded and case.total >= BLOCK_TOKENS:  # numbers that are a step off are noticed
        off = values + np.float32(0.01)
        assert not close(whole, reference(filled, queries, keys, off), tolerance)
        assert not close(whole, reference(filled, queries, keys * np.float32(1.01), values), tolerance)


@pytest.mark.parametrize(
    ("kinds", "isa"),
    [
        ((KVType.Q8_0, KVType.Q4_0), ISAS[0]),
        ((KVType.KIVI2, KVType.F16), ISAS[0]),
        ((KVType.F16, KVType.KIVI4), ISAS[0]),
    ],
    ids=named,
)
def test_keys_and_values_of_different_types(kinds: tuple[KVType, KVType], isa: ISA) -> None:
    case = CASES[0]
    filled = Filled(case, *kinds)
    filled.append(0, case.total, isa)
    queries = floats(0, case.tokens, case.heads * case.key_length)
    whole, _ = attended(filled, queries, isa)
    assert close(whole, reference(filled, queries, *filled.expected()), CODED_TOLERANCE)


@pytest.mark.parametrize(("length", "isa"), [(8, ISAS[0]), (32, NARROW), *((64, isa) for isa in ISAS[:-1])], ids=named)
def test_turned_heads(length: int, isa: ISA) -> None:
    case = Case(2, 1, length, length, tokens=3, start=70)
    filled = Filled(case, KVType.F16, KVType.F16, rotates=True)
    queries = floats(0, case.total, case.heads * length)
    turned = queries.copy()
    filled.append(0, case.total, isa, turned)
    assert close(turned.reshape(-1, length), walsh_hadamard(queries.reshape(-1, length)), 1e-6)
    whole, split = attended(filled, turned[case.start :], isa)
    keys, values = filled.expected()
    assert close(whole, reference(filled, turned[case.start :], keys, values), 1e-3)  # float16 may round elsewhere
    plain = Filled(case, KVType.F16, KVType.F16)
    plain.append(0, case.total, isa)
    assert close(whole, attended(plain, queries[case.start :], isa)[0], 2e-3), "turning changes no result"
    assert (split == whole).all()


def test_what_is_rounded_how() -> None:
    x = np.array([[-4.0, 2.0, 0.5, 3.9]], np.float32)
    codes, scale, least = encoded(x, KVType.Q4_0)
    assert (codes.tolist(), scale.item(), least.item()) == ([[-8, 4, 1, 7]], 0.5, 0.0)
    codes, scale, least = encoded(x[:, :3], KVType.KIVI2)
    assert (codes.tolist(), scale.item(), least.item()) == ([[0, 3, 2]], 2.0, -4.0)
    codes, scale, _ = encoded(np.array([[1.27, -1.0, 0.0]], np.float32), KVType.Q8_0)
    assert codes.tolist() == [[127, -100, 0]]
    assert encoded(np.zeros((1, 4), np.float32), KVType.Q8_0)[1].item() == 0


@pytest.mark.parametrize("kind", CODED)
@pytest.mark.parametrize("damage", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(kind: KVType, damage: float) -> None:
    case = Case(1, 1, 64, 64, tokens=1, start=64)
    filled = Filled(case, kind, kind)
    filled.plain_keys[7, 40] = damage
    filled.plain_values[9, 3] = damage
    filled.append(0, case.total, None)
    with np.errstate(all="ignore"):
        assert not np.isfinite(unpacked_keys(filled.layout, filled.chunks, 64)[0, 7]).all()
        assert not np.isfinite(unpacked_values(filled.layout, filled.chunks, 65)[0, 9]).all()


def test_bytes_of_blocks() -> None:
    halves = KVType.F16.key_block_bytes(64) + KVType.F16.value_block_bytes(64)
    share = {kind: (kind.key_block_bytes(64) + kind.value_block_bytes(64)) / halves for kind in KVType}
    assert share == pytest.approx(
        {"f16": 1, "bf16": 1, "q8_0": 17 / 32, "q4_0": 9 / 32, "kivi4": 9 / 32, "kivi2": 5.5 / 32}
    )
    assert all(kind.key_block_bytes(length) % 64 == 0 for kind in KVType for length in (2, 6, 33, 80))
    layout = KVLayout(2, 64, 64, 1000, KVType.KIVI2, KVType.KIVI2)
    assert layout.token_bytes == 2 * (20 + 24)
    assert layout.window_bytes == 2 * KVLayout(2, 64, 64, 1000).values_start


def test_wrong_layouts_are_refused() -> None:
    with pytest.raises(ValueError, match="not a power of two"):
        KVLayout(1, 48, 64, 1, rotates_keys=True)
    with pytest.raises(ValueError, match="no window of keys"):
        code_keys_row(KVMemory(KVLayout(1, 64, 64, 1), 0), tokens=1, start=0)
