"""Q8_0: signed bytes, a float16 scale for every 32. Layout of a block: GGML's `ggml-common.h`."""

from functools import partial

from cpu_kernels.dot import Layout, Part, Tile
from cpu_kernels.pack_lanes import LanePacker


class EightBit(Layout):
    """A step: eight vectors of bytes, then the scales."""

    unrolled_steps = 2

    def pack(self, packer: LanePacker) -> None:
        """d, then 32 bytes."""
        packer.copy_words(2, 8)
        packer.copy_halves(0)

    def dot(self, tile: Tile) -> None:
        """Bytes as they are."""
        size = tile.vector_bytes
        codes = [partial(tile.load, index * size) for index in range(8)]
        tile.block([Part(codes, tile.load_half(8 * size), is_signed=True)])
        tile.advance(8 * size + size // 2)
