"""What a query head has gathered from some tokens, as parts of the attention kernels: emptied, merged, finished.

A state is the sum of weighted values (filled up to whole tiles), the greatest score m, the sum of weights l; weights
are exp(score - m). A fresh state has m = NOTHING, l = 0 and sums of 0: merging it changes no bit of another. The same
holds for a block that a row does not see.
"""

from dataclasses import dataclass

from cpu_kernels.kv_encode import rotate_head
from cpu_kernels.kv_layout import TILE_DIMS, KVLayout
from cpu_kernels.kv_types import KVType
from cpu_kernels.simd import F32, Kernel, Value
from cpu_kernels.traced import each, exp, spread

NOTHING = -1e30  # a score below all others, yet finite, so that differences are numbers


@dataclass(frozen=True, slots=True)
class Shape:
    """What kernels are specialised for."""

    key_length: int
    value_length: int
    capped: bool
    key_type: KVType
    value_type: KVType
    rotates_values: bool
    chooses: bool = False

    @classmethod
    def of(cls, layout: KVLayout, *, capped: bool, chooses: bool = False) -> "Shape":
        """That of a cache; `capped`: scores go through a softcap; `chooses`: only chosen blocks are read."""
        types = (layout.key_type, layout.value_type, layout.rotates_values)
        return cls(layout.key_length, layout.value_length, capped, *types, chooses)

    @property
    def padded(self) -> int:
        """Dimensions of a value in whole tiles."""
        return -(-self.value_length // TILE_DIMS) * TILE_DIMS

    @property
    def name(self) -> str:
        """Differs where kernels do."""
        types = f"{self.key_type}_{self.value_type}{'_turned' if self.rotates_values else ''}"
        kinds = f"{'_capped' if self.capped else ''}{'_chosen' if self.chooses else ''}"
        return f"{self.key_length}_{self.value_length}_{types}{kinds}"


def state_floats(value_length: int) -> int:
    """Float32 numbers of a state: whole cache lines."""
    return -(-value_length // TILE_DIMS) * TILE_DIMS + 16


def clear_state(k: Kernel, state: Value, shape: Shape) -> None:
    """A fresh state."""
    for dim in range(0, shape.padded, k.lanes):
        k.store(k.constant(k.floats, 0.0), state + 4 * dim)
    k.store(k.constant(F32, NOTHING), state + 4 * shape.padded)
    k.store(k.constant(F32, 0.0), state + (4 * shape.padded + 4))


def merge_state(k: Kernel, into: Value, state: Value, shape: Shape) -> None:
    """Adds what another state has gathered."""
    at = 4 * shape.padded
    before, other = k.load(F32, into + at), k.load(F32, state + at)
    most = k.maximum(before, other)
    keep, take = exp(k, before - most), exp(k, other - most)
    k.store(most, into + at)
    k.store(k.fma(k.load(F32, state + (at + 4)), take, k.load(F32, into + (at + 4)) * keep), into + (at + 4))
    for dim in range(0, shape.padded, k.lanes):
        kept = k.load(k.floats, into + 4 * dim) * k.splat(keep)
        k.store(k.fma(k.load(k.floats, state + 4 * dim), k.splat(take), kept), into + 4 * dim)


def tell_state(k: Kernel, out: Value, marks: Value, marks_apart: Value, state: Value, shape: Shape) -> None:
    """out = as `finish_state`, zeros where nothing was gathered; at `marks` the greatest score, and `marks_apart` bytes
    behind it the sum of weights: what another part of the same row can be added to.
    """
    at = 4 * shape.padded
    total, none = k.load(F32, state + (at + 4)), k.constant(F32, 0.0)
    k.store(k.load(F32, state + at), marks)
    k.store(total, marks + marks_apart)
    k.store(k.select(total > none, total, k.constant(F32, 1.0)), state + (at + 4))
    finish_state(k, out, state, shape)


def finish_state(k: Kernel, out: Value, state: Value, shape: Shape) -> None:
    """out = weighted values / sum of weights, turned back if values were turned."""
    total = k.load(F32, state + (4 * shape.padded + 4))
    each(
        k,
        k.int64(shape.value_length),
        lambda at, kind: k.store(k.load(kind, state + at) / spread(k, total, kind), out + at),
    )
    if shape.rotates_values:
        rotate_head(k, out, shape.value_length)
