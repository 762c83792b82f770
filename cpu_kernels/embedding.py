"""Rows of an embedding table for a step's tokens. Knows nothing about models."""

from cpu_kernels.isa import ISA
from cpu_kernels.matrix import Matrix, require_columns
from cpu_kernels.native import float_bits
from cpu_kernels.program import Field, Row
from cpu_kernels.simd import I32, I64, Kernel
from cpu_kernels.traced import TracedOperation, each, spread

OUTSIDE = 102  # the error code for a row that the table does not have


def embedding_row(
    out: Matrix,
    table: Matrix,
    table_rows: int,
    ids: int,
    tokens: Field,
    *,
    status: int,
    scale: float = 1.0,
    isa: ISA | None = None,
) -> Row:
    """out[token] = table[ids[token]] * scale; `ids`: address of int32.

    A table that is quantised is no concern of this module: the caller dequantises the rows it needs and numbers them.
    `status`: `Program.status_address`, set to OUTSIDE by an id that is not a row.
    """
    require_columns("embedding", out.columns, table)
    args = (
        *(out.address, out.stride_bytes, table.address, table.stride_bytes, out.columns, table_rows),
        *(ids, float_bits(scale), status),
    )
    return Row("embedding", _EMBEDDING.address_for(isa), tokens, args)


def _trace(k: Kernel) -> None:
    out, out_stride, table, table_stride, columns, rows, ids = (k.arg(index) for index in range(7))
    scale = k.float_arg(7)
    with k.loop(k.begin, k.end) as token:
        row = k.load(I32, ids + token * 4).extend(I64, signed=True)
        known = (row >= 0) & (row < rows)
        with k.when(known):
            source, to = table + row * table_stride, out + token * out_stride
            each(k, columns, lambda at, kind: k.store(k.load(kind, source + at) * spread(k, scale, kind), to + at))
        with k.when(known.equals(0)):
            k.store(k.int64(OUTSIDE), k.arg(8))


_EMBEDDING = TracedOperation("embedding", _trace)
