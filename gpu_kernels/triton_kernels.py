"""Every operation of `Kernels` with Triton kernels on an NVIDIA GPU; torch where `Dispatch` says so.

Torch computes products with types that no kernel decodes, and `topk`, which is a sort of long rows. All else is
Triton's. In steps of up to `STEP_COLUMNS` tokens, and `STEP_PAIRS` pairs with experts, a token's results are the same
to the bit whatever tokens are beside it; prompts in longer parts are summed otherwise, so that their keys and values
end differently in their last bits. Knows nothing about models. Importing this imports Triton.
"""

from dataclasses import dataclass, field

import torch

from gpu_kernels import checks, triton_attend
from gpu_kernels.blocks import KVBlocks, Lanes, Rotation
from gpu_kernels.dispatch import Dispatch
from gpu_kernels.kernels import SMALLEST_WEIGHT_SUM
from gpu_kernels.matrix import GpuMatrix
from gpu_kernels.tiles import STEP_PAIRS, GpuTraits, ceil_div, power_of_two
from gpu_kernels.torch_kernels import TorchKernels
from gpu_kernels.triton_elementwise import (
    add_norm_kernel,
    elementwise_kernel,
    gather_kernel,
    rms_norm_kernel,
    route_kernel,
    scatter_kernel,
)
from gpu_kernels.triton_matmul import Product

_BLOCK = 1024
_SCATTER_PAIRS = 32
_SCATTER_BLOCK = 128


@dataclass(frozen=True, slots=True)
class TritonKernels:
    """See `Kernels`. `is_exact`: products and attention of float32 numbers also where matrix units would be faster."""

    dispatch: Dispatch
    is_exact: bool = False
    name: str = "triton"
    _torch: TorchKernels = field(default_factory=TorchKernels)

    @classmethod
    def on(cls, torch_device: str, *, is_exact: bool = False) -> "TritonKernels":
        """For a CUDA device, with the dispatch of its generation."""
        return cls(Dispatch(traits_of(torch_device)), is_exact)

    def matmul(
        self,
        x: torch.Tensor,
        w: GpuMatrix,
        out: torch.Tensor,
        *,
        adds: bool = False,
        scale: float = 1.0,
        bias: torch.Tensor | None = None,
    ) -> None:
        """See `Kernels.matmul`."""
        checks.check_matmul(x, w, out, bias)
        way = self.dispatch.way(w.quant_type, x.shape[0])
        if way == "torch":
            self._torch.matmul(x, w, out, adds=adds, scale=scale, bias=bias)
            return
        product = Product(x, w, out, self.dispatch.gpu, self.is_exact, adds=adds, scale=scale, bias=bias)
        {"few": product.few, "many": product.many, "decoded": product.decoded}[way]()

    def expert_matmul(
        self,
        x: torch.Tensor,
        w: GpuMatrix,
        segments: torch.Tensor,
        out: torch.Tensor,
        *,
        scales: torch.Tensor | None = None,
    ) -> None:
        """See `Kernels.expert_matmul`."""
        checks.check_expert_matmul(x, w, segments, out, scales)
        pairs = x.shape[0]
        if self.dispatch.way(w.quant_type, 1) == "torch":
            self._torch.expert_matmul(x, w, segments, out, scales=scales)
            return
        product = Product(x, w, out, self.dispatch.gpu, self.is_exact, segments=segments, scales=scales)
        if pairs <= STEP_PAIRS:  # most experts have one or two
            product.few(1 if pairs <= segments.shape[0] else 2)
        else:
            product.many(ceil_div(pairs, segments.shape[0]))

    def gather_rows(self, x: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
        """See `Kernels.gather_rows`."""
        checks.check_gather(x, index, out)
        gather_kernel[(out.shape[0], ceil_div(out.shape[1], _BLOCK))](
            *(x, index, out, x.shape[0], x.shape[1], x.stride(0), out.stride(0)), BLOCK=_BLOCK, enable_fp_fusion=True
        )

    def scatter_add_weighted(
        self,
        out: torch.Tensor,
        y: torch.Tensor,
        weights: torch.Tensor,
        token_of_pair: torch.Tensor,
        count: torch.Tensor,
    ) -> None:
        """See `Kernels.scatter_add_weighted`."""
        checks.check_scatter(out, y, weights, token_of_pair, count)
        scatter_kernel[(out.shape[0], ceil_div(out.shape[1], _SCATTER_BLOCK))](
            *(out, y, weights, token_of_pair, count, out.shape[1], out.stride(0), y.stride(0)),
            PAIRS=_SCATTER_PAIRS,
            BLOCK=_SCATTER_BLOCK,
            enable_fp_fusion=True,
        )

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, eps: float, heads: int = 1) -> None:
        """See `Kernels.rms_norm`."""
        checks.check_norm("rms_norm", x, weight, out, heads)
        columns = x.shape[1] // heads
        rms_norm_kernel[(x.shape[0], heads)](
            *(x, weight, out, columns, x.stride(0), out.stride(0), eps),
            BLOCK=power_of_two(columns),
            num_warps=_norm_warps(columns),
            enable_fp_fusion=True,
        )

    def add_norm(
        self,
        x: torch.Tensor,
        delta: torch.Tensor,
        weight: torch.Tensor,
        out: torch.Tensor,
        *,
        eps: float,
        delta_weight: torch.Tensor | None = None,
    ) -> None:
        """See `Kernels.add_norm`."""
        checks.check_norm("add_norm", x, weight, out, 1)
        checks.check_same("add_norm", x=x, delta=delta)
        checks.check_vector("add_norm", "delta_weight", delta_weight, x.shape[1], torch.float32)
        add_norm_kernel[(x.shape[0],)](
            *(x, delta, weight if delta_weight is None else delta_weight, weight, out),
            *(x.shape[1], x.stride(0), delta.stride(0), out.stride(0), eps),
            BLOCK=power_of_two(x.shape[1]),
            NORMS_DELTA=delta_weight is not None,
            num_warps=_norm_warps(x.shape[1]),
            enable_fp_fusion=True,
        )

    def add(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """See `Kernels.add`."""
        checks.check_same("add", out=out, x=x)
        _elementwise("add", out, out, x)

    def add_gated(self, out: torch.Tensor, x: torch.Tensor, gate: torch.Tensor) -> None:
        """See `Kernels.add_gated`."""
        checks.check_gated(out, x, gate)
        _elementwise("add_gated", out, out, x, vector=gate.contiguous())

    def gate(self, gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor, *, activation: str) -> None:
        """See `Kernels.gate`."""
        checks.check_gate(gate, up, out, activation)
        _elementwise(activation, out, gate, up)

    def softcap(self, x: torch.Tensor, *, cap: float) -> None:
        """See `Kernels.softcap`."""
        checks.check_rows("softcap", x=x)
        _elementwise("softcap", x, x, x, number=cap)

    def scale_bias(self, x: torch.Tensor, *, scale: float = 1.0, bias: torch.Tensor | None = None) -> None:
        """See `Kernels.scale_bias`."""
        checks.check_rows("scale_bias", x=x)
        checks.check_vector("scale_bias", "bias", bias, x.shape[1], torch.float32)
        _elementwise("scale_bias", x, x, x, vector=bias, number=scale)

    def heads(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        rotation: Rotation,
        cache: KVBlocks,
        lanes: Lanes,
        *,
        query_norm: torch.Tensor | None = None,
        key_norm: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        """See `Kernels.heads`."""
        checks.check_heads(queries, keys, values, positions, rotation, cache, lanes, (query_norm, key_norm))
        triton_attend.turn_and_append(
            *(queries, keys, values, positions, rotation, cache, lanes),
            query_norm=query_norm,
            key_norm=key_norm,
            eps=eps,
        )

    def attention(
        self,
        queries: torch.Tensor,
        cache: KVBlocks,
        lanes: Lanes,
        out: torch.Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        marks: torch.Tensor | None = None,
    ) -> None:
        """See `Kernels.attention`."""
        checks.check_attention(queries, cache, lanes, out, window, marks)
        triton_attend.attend(
            *(queries, cache, lanes, out, marks),
            scale=scale,
            window=window,
            softcap=softcap,
            gpu=self.dispatch.gpu,
            is_exact=self.is_exact,
        )

    def join_parts(self, out: torch.Tensor, marks: torch.Tensor, part: torch.Tensor) -> None:
        """See `Kernels.join_parts`."""
        checks.check_parts(out, marks, part)
        triton_attend.join_parts(out, marks, part)

    def route(
        self, logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, *, norm: bool, scale: float = 1.0
    ) -> None:
        """See `Kernels.route`."""
        checks.check_chosen("route", logits, weights, ids)
        used = ids.shape[1]
        route_kernel[(logits.shape[0],)](
            *(logits, ids, weights, logits.shape[1], logits.stride(0), ids.stride(0), weights.stride(0)),
            *(scale, SMALLEST_WEIGHT_SUM),
            USED=used,
            U=power_of_two(used),
            E=power_of_two(logits.shape[1]),
            NORMS=norm,
            num_warps=1,
            enable_fp_fusion=True,
        )

    def topk(self, logits: torch.Tensor, values: torch.Tensor, ids: torch.Tensor) -> None:
        """See `Kernels.topk`."""
        self._torch.topk(logits, values, ids)


def traits_of(torch_device: str) -> GpuTraits:
    """What choices of kernels depend on, of a CUDA device."""
    properties = torch.cuda.get_device_properties(torch.device(torch_device))
    return GpuTraits(properties.multi_processor_count, 10 * properties.major + properties.minor)


def _norm_warps(columns: int) -> int:
    """That share a row."""
    return 1 if columns <= 256 else 4 if columns <= 2048 else 8


def _elementwise(
    operation: str,
    out: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    vector: torch.Tensor | None = None,
    number: float = 1.0,
) -> None:
    elementwise_kernel[(out.shape[0], ceil_div(out.shape[1], _BLOCK))](
        *(out, x, y, out if vector is None else vector, out.shape[1]),
        *(out.stride(0), x.stride(0), y.stride(0), number),
        OPERATION=operation,
        HAS_VECTOR=vector is not None,
        BLOCK=_BLOCK,
        enable_fp_fusion=True,
    )
