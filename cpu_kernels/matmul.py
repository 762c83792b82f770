"""Products of panels and activations as operations of a program. Knows nothing about tensors or models."""

from cpu_kernels.activations import ActivationBuffer
from cpu_kernels.compiler import kernel_address
from cpu_kernels.dot_frame import MAX_BATCH, trace_matmul, unpacked_steps
from cpu_kernels.formats import PanelFormat
from cpu_kernels.program import Field, Row

_SECOND_LEVEL_BYTES = 384 << 10  # activations of the columns of a batch, which every row group goes through
_FIRST_LEVEL_BYTES = (
    10 << 10
)  # weights of a chunk, which every tile of a batch goes through, and the tile's activations


def matmul_address(form: PanelFormat) -> int:
    """The kernel of a format, for any number of columns."""
    return kernel_address(
        f"matmul_{form.name}", form.isa, lambda kernel: trace_matmul(kernel, form.layout), thorough=False
    )


def matmul_row(
    form: PanelFormat,
    panels: int,
    rows: int,
    k: int,
    activations: ActivationBuffer,
    out: Field,
    out_stride_bytes: int,
    n: Field,
    *,
    adds: bool = False,
    keep: tuple[object, ...] = (),
) -> Row:
    """out (n, rows) = activations (n, k) times the transposed matrix (rows, k) at address `panels`.

    With `adds` the product is added to what is in `out`. Rows of `out` begin `out_stride_bytes` apart. Work items are
    row groups, best handed out as one contiguous slice a thread. ValueError if the activations are of another kind,
    width or ISA than the panels.
    """
    if activations.kind is not form.activation_kind or activations.k != k or activations.isa != form.isa:
        raise ValueError(
            f"{form.quant_type.name} panels of {k} columns for {form.isa.name} cannot be multiplied with "
            f"{activations.kind.name} activations of {activations.k} for {activations.isa.name}"
        )
    if isinstance(n, int) and not 0 <= n <= activations.capacity:
        raise ValueError(f"{n} columns in a buffer for {activations.capacity}")
    tile = form.isa.tile_columns
    batch = max(1, min(MAX_BATCH // tile, _SECOND_LEVEL_BYTES // (tile * activations.kind.row_bytes(k)))) * tile
    layout = form.layout
    step_bytes = layout.step_row_bytes * form.group_rows + tile * activations.kind.row_bytes(layout.step_columns)
    chunk = max(1, _FIRST_LEVEL_BYTES // step_bytes)
    if layout.unpacks_first:
        chunk = unpacked_steps(layout, form.isa.lanes)
    args: tuple[Field, ...] = (
        panels,
        form.group_bytes(k),
        form.steps(k),
        rows,
        activations.address,
        n,
        out,
        out_stride_bytes,
        int(adds),
        batch,
        chunk,
    )
    return Row(f"matmul_{form.name}", matmul_address(form), form.groups(rows), args, keep=(activations, *keep))
