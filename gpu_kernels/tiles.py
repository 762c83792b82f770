"""How much of a product or of attention one program of a kernel takes, from shapes and the GPU's properties.

Every number is a choice for speed; none changes what is computed, except that sums are split differently. For steps of
up to `STEP_COLUMNS` tokens no choice that decides how a sum is split depends on how many there are: one token then gets
the same bits alone and beside the others that a draft is verified with. Longer parts of prompts are summed otherwise.
Knows nothing about torch or Triton. The choices come from instructions and registers counted in compiled kernels: a
program of few columns must hold all it decodes in registers, and one of many columns must not decode the same weights
in every warp.
"""

from dataclasses import dataclass

from gpu_kernels.decoding import Decoding

STEP_COLUMNS = 32  # tokens: of a step, or of a lane in attention
STEP_PAIRS = 256  # of tokens and experts
SPLIT_TOKENS = 256  # of the context, that a program takes in a step
_MOST_SPLITS = 16


@dataclass(frozen=True, slots=True)
class GpuTraits:
    """What of a GPU the choices depend on."""

    processors: int
    capability: int  # 61, 75, 80, ...

    @property
    def has_matrix_units(self) -> bool:
        """Whether Triton's `dot` becomes matrix instructions: from Ampere on."""
        return self.capability >= 80


@dataclass(frozen=True, slots=True)
class ProductTile:
    """`columns` tokens, `rows` of weights and `groups` of a row at a time; `splits` programs share a row."""

    columns: int
    rows: int
    groups: int
    warps: int
    splits: int = 1

    def split_groups(self, groups: int) -> int:
        """Groups that one of the programs sharing a row takes: whole tiles."""
        tiles = ceil_div(groups, self.groups)
        return ceil_div(tiles, self.splits) * self.groups


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """`rows` of query heads meet `tokens` of the context at a time; `splits` programs take `SPLIT_TOKENS` each, or all.

    Splits are 1 where one program takes all.
    """

    rows: int
    tokens: int
    warps: int
    splits: int


def ceil_div(number: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-number // divisor)


def power_of_two(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << max(number - 1, 0).bit_length()


def few_columns_tile(decoding: Decoding, tokens: int, rows: int, columns: int, gpu: GpuTraits) -> ProductTile:
    """For 1 to 4 columns at a time, four warps. Fewer rows a program where the matrix would not fill the GPU."""
    at_once = min(power_of_two(tokens), 4)
    wide = 8  # columns and scales of scales take registers
    while wide > 4 and ceil_div(rows, wide) < 2 * gpu.processors:
        wide //= 2
    most = 128 if decoding.block_groups == 0 else 32
    groups = min(most, max(4, power_of_two(decoding.groups(columns))))
    return ProductTile(at_once, wide, groups, warps=4)


def many_columns_tile(
    decoding: Decoding, tokens: int, rows: int, columns: int, gpu: GpuTraits, *, is_float32: bool
) -> ProductTile:
    """For 16 columns and more; a row is split where the tiles would not fill the GPU. Tiles of float32 are small.

    In steps as for 16 columns, however many there are.
    """
    if is_float32:
        return ProductTile(16, 32, max(1, 32 // decoding.units), warps=4)
    tokens = 16 if tokens <= STEP_COLUMNS else tokens
    at_once = min(max(16, power_of_two(tokens)), 64)
    tile_rows, warps = (128, 8) if at_once == 64 else (64, 4)
    groups = 64 // decoding.units
    programs = ceil_div(rows, tile_rows) * ceil_div(tokens, at_once)
    tiles = ceil_div(decoding.groups(columns), groups)
    splits = max(1, min(2 * gpu.processors // programs, tiles // 4, _MOST_SPLITS))
    return ProductTile(at_once, tile_rows, groups, warps, splits)


def attention_tile(group: int, tokens: int, most_context: int, length: int, *, is_float32: bool) -> AttentionTile:
    """For `tokens` of a lane with `group` query heads for one of keys; `length`: of the longest head.

    In steps the context is shared, at places that do not depend on who looks at it.
    """
    if tokens <= STEP_COLUMNS:
        return AttentionTile(16, 32, 4, ceil_div(most_context, SPLIT_TOKENS))
    rows = tokens * group
    if is_float32 or length > 128:
        return AttentionTile(16, 32, 4, 1)
    return AttentionTile(32 if rows <= 32 else 64, 32, 4, 1)
