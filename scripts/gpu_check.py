"""Checks the GPU kernels on this machine's NVIDIA GPU: results first, then shares of the memory bandwidth.

    python -m scripts.gpu_check [--types Q4_0 Q8_0] [--columns 1 4 16] [--side 4096] [--json]

Every quant type is multiplied in every way and compared with torch's decoded product; then the table says which share
of the measured read bandwidth a product reaches, for every number of columns, and what `Dispatch` would choose. Ends
with status 1 if a result is wrong or a goal is missed: Q8_0 80% and Q4_0 70% at one column, 16 columns in at most 1.5
times the time of one.
"""

import argparse
import json
import sys
from dataclasses import dataclass

import torch

from gpu_kernels.decoding import DECODINGS
from gpu_kernels.dispatch import BUCKETS, Dispatch, measured_dispatch, why_no_triton
from gpu_kernels.layouts import layout
from gpu_kernels.matrix import arrange
from gpu_kernels.product_times import ProductTimes
from gpu_kernels.torch_kernels import TorchKernels
from gpu_kernels.triton_kernels import TritonKernels, traits_of

TOLERANCES = {"few": 1e-5, "many": 2e-3, "decoded": 4e-3}  # of the greatest result
SHARES = {"Q8_0": 0.8, "Q4_0": 0.7}
MOST_TIMES_AT_16 = 1.5


@dataclass(slots=True)
class Report:
    """What was found; `is_good` until something is wrong."""

    as_json: bool
    is_good: bool = True

    def row(self, **values: object) -> None:
        """One line; a value `ok` that is False makes the whole bad."""
        self.is_good = self.is_good and values.get("ok") is not False
        text = json.dumps(values) if self.as_json else "  ".join(f"{name} {value}" for name, value in values.items())
        print(text, flush=True)


def check_products(report: Report, device: torch.device, types: list[str]) -> None:
    """Every type in every way, at a shape that fills no tile."""
    gpu, generator = traits_of(str(device)), torch.Generator().manual_seed(1)
    for name in types:
        rows, columns, tokens = 517, 1024 if DECODINGS[name].block_groups else 999, 19
        raw = _ordinary_rows(name, rows, columns, generator)
        matrix = arrange(raw.to(device), name)
        x = torch.randn((tokens, columns), generator=generator).to(device)
        wanted, found = (torch.empty((tokens, rows), device=device) for _ in range(2))
        TorchKernels().matmul(x, matrix, wanted)
        for way, tolerance in TOLERANCES.items():
            table = {(name, bucket): way for bucket in BUCKETS}
            TritonKernels(Dispatch(gpu, table)).matmul(x, matrix, found)
            off = float((found - wanted).abs().max() / wanted.abs().max())
            report.row(check="product", type=name, way=way, off=f"{off:.1e}", ok=off <= tolerance)


def check_shares(report: Report, times: ProductTimes, types: list[str], columns: list[int]) -> None:
    """The table of bandwidth shares, and the goals."""
    peak = times.bytes_per_s()
    report.row(check="bandwidth", gb_per_s=round(peak / 1e9, 1))
    for name in types:
        seconds: dict[tuple[int, str], float] = {}

        def timed(kind: str, count: int, way: str, kept: dict[tuple[int, str], float] = seconds) -> float:
            kept[count, way] = times.seconds(kind, count, way)
            return kept[count, way]

        dispatch = measured_dispatch(times.gpu, [name], timed, columns)
        best = {count: seconds[count, dispatch.way(name, count)] for count in columns}
        for count in columns:
            share = times.matrix_bytes(name) / best[count] / peak
            is_met = share >= SHARES.get(name, 0.0) if count == 1 else True
            report.row(
                check="share",
                type=name,
                columns=count,
                way=dispatch.way(name, count),
                us=round(1e6 * best[count], 1),
                share=round(share, 3),
                ok=is_met,
            )
        if 1 in best and 16 in best:
            ratio = best[16] / best[1]
            report.row(check="16 columns / 1", type=name, ratio=round(ratio, 2), ok=ratio <= MOST_TIMES_AT_16)
        times.forget()


def _ordinary_rows(name: str, rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Random raw rows whose float scales are about 0.05."""
    if name == "BF16":
        return torch.randn((rows, columns), generator=generator).bfloat16().view(torch.uint8)
    block = layout(name)
    raw = torch.randint(0, 120, (rows, block.blocks(columns), block.block_bytes), generator=generator).byte()
    for part in block.fields:
        if part.dtype in {"float16", "float32"}:
            numbers = torch.randn((rows, block.blocks(columns), part.count), generator=generator) * 0.05
            stored = numbers.half() if part.dtype == "float16" else numbers
            raw[..., part.offset : part.offset + part.num_bytes] = stored.view(torch.uint8)
    return raw.flatten(1)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=list(DECODINGS), choices=list(DECODINGS))
    parser.add_argument("--columns", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 256], choices=BUCKETS)
    parser.add_argument("--side", type=int, default=4096, help="rows and columns of the timed matrices")
    parser.add_argument("--json", action="store_true", help="JSON lines")
    options = parser.parse_args()
    reason = why_no_triton() if torch.cuda.is_available() else "torch sees no CUDA device"
    if reason is not None:
        sys.exit(f"nothing to check: {reason}")
    device = torch.device("cuda:0")
    report, gpu = Report(options.json), traits_of("cuda:0")
    report.row(gpu=torch.cuda.get_device_name(device), sm=gpu.capability, processors=gpu.processors)
    check_products(report, device, options.types)
    times = ProductTimes(device, gpu, rows=options.side, columns=options.side)
    check_shares(report, times, options.types, options.columns)
    sys.exit(0 if report.is_good else 1)


if __name__ == "__main__":
    main()
