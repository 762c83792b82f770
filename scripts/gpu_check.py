"""Checks strata on this machine's NVIDIA GPU: kernels' results, their shares of the bandwidth, and whole models.

    python -m scripts.gpu_check [--types Q4_0 Q8_0] [--columns 1 4 16] [--caps 4GiB 8GiB] [--minutes 7] [--json]
    python -m scripts.gpu_check --quick --gpu sim:vram=4GiB,bw=192GB/s,link=6GB/s,tflops=6 --model FILE

Quant types are multiplied in every way and compared with torch's decoded product; tokens of a step with the same tokens
alone, to the bit. Then a table says which share of the measured read bandwidth a product reaches in the way that is
quickest. Then models of known shapes, with random weights, are run by the CPU alone, by both with the GPU's memory
capped, and by the GPU (`scripts/gpu_end_to_end.py`). What there is no time for is named. Ends with status 1 if a result
is wrong or a goal is missed: Q8_0 80% and Q4_0 70% of the bandwidth at one column, 16 columns in at most 1.5 times the
time of one; decoding with the greatest cap 1.5 times as fast as by the CPU alone, predictions within 15%, a 1B model
that is all on the GPU 60% of the bandwidth.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from gpu_kernels.decoding import DECODINGS
from gpu_kernels.dispatch import BUCKETS, Dispatch, dispatch_of, measured_ways, why_no_triton
from gpu_kernels.layouts import layout
from gpu_kernels.matrix import arrange
from gpu_kernels.product_shape import ProductShape
from gpu_kernels.product_times import ProductTimes
from gpu_kernels.simulated_spec import SimulatedSpec
from gpu_kernels.torch_kernels import TorchKernels
from gpu_kernels.triton_kernels import TritonKernels, traits_of
from planner.budget import parse_size
from planner.gpu_choice import FOUND, is_simulated
from scripts.gpu_end_to_end import Setting, rows_of, shapes_in

TOLERANCES = {"few": 1e-5, "many": 2e-3, "decoded": 4e-3}  # of the greatest result
SHARES = {"Q8_0": 0.8, "Q4_0": 0.7}
MOST_TIMES_AT_16 = 1.5
COLUMNS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


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
    """The table of bandwidth shares, and the goals; up to `STEP_COLUMNS` columns in the way that steps have."""
    peak = times.bytes_per_s()
    report.row(check="bandwidth", gb_per_s=round(peak / 1e9, 1))
    for name in types:
        shape = ProductShape(name, times.rows, times.columns)
        kept: dict[tuple[int, str], float] = {}

        def timed(shape: ProductShape, count: int, way: str, kept: dict[tuple[int, str], float] = kept) -> float:
            if (count, way) not in kept:
                kept[count, way] = times.seconds(shape.quant_type, count, way)
            return kept[count, way]

        dispatch = dispatch_of(times.gpu, [shape], measured_ways([shape], timed, {}))
        best = {count: timed(shape, count, dispatch.way(name, count)) for count in columns}
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


def check_steps(report: Report, device: torch.device, types: list[str]) -> None:
    """Tokens get the same bits alone as beside others, in every way that a step may take."""
    gpu, generator = traits_of(str(device)), torch.Generator().manual_seed(2)
    for name in types:
        columns = 1024 if DECODINGS[name].block_groups else 999
        matrix = arrange(_ordinary_rows(name, 517, columns, generator).to(device), name)
        x = torch.randn((17, columns), generator=generator).to(device)
        for way in ("few", "many"):
            kernels = TritonKernels(Dispatch(gpu, {(name, bucket): way for bucket in BUCKETS}))
            together, alone = (torch.empty((17, 517), device=device) for _ in range(2))
            kernels.matmul(x, matrix, together)
            for token in range(17):
                kernels.matmul(x[token : token + 1], matrix, alone[token : token + 1])
            report.row(check="same bits in steps", type=name, way=way, ok=torch.equal(together, alone))


def check_end_to_end(report: Report, options: argparse.Namespace, bandwidth_bytes_per_s: float | None) -> None:
    """Whole models, until the minutes are over. Where the GPU is simulated goals are told, and make nothing bad."""
    setting = Setting(
        gpu=options.gpu,
        caps=[parse_size(cap) for cap in options.caps],
        stops_at=options.begun + 60 * options.minutes,
        prompt_tokens=options.prompt_tokens,
        answer_tokens=options.answer_tokens,
        threads=options.threads,
        bandwidth_bytes_per_s=bandwidth_bytes_per_s,
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = (
            shapes_in(Path(folder), setting)
            if options.model is None
            else rows_of(options.model, setting, draft=options.draft)
        )
        for row in rows:
            if options.quick and "ok" in row:
                row["met"] = row.pop("ok")
            report.row(**row)


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


def check_kernels(report: Report, options: argparse.Namespace) -> float:
    """Results and shares of the kernels of this machine's GPU; the bandwidth of its memory, bytes a second."""
    device, gpu = torch.device("cuda:0"), traits_of("cuda:0")
    report.row(check="gpu", gpu=torch.cuda.get_device_name(device), sm=gpu.capability, processors=gpu.processors)
    check_products(report, device, options.types)
    check_steps(report, device, options.types)
    times = ProductTimes(device, gpu, rows=options.side, columns=options.side)
    check_shares(report, times, options.types, options.columns)
    return times.bytes_per_s()


def main() -> None:
    """See the module."""
    options = _parser().parse_args()
    options.begun = time.monotonic()
    report = Report(options.json)
    if is_simulated(options.gpu):
        report.row(check="gpu", gpu=f"simulated: {options.gpu}")
        report.row(check="left out", reason="kernels are not checked on a simulated GPU")
        bandwidth: float = SimulatedSpec.parse(options.gpu).bytes_per_s
    else:
        reason = why_no_triton() if torch.cuda.is_available() else "torch sees no CUDA device"
        if reason is not None:
            sys.exit(f"nothing to check: {reason}")
        bandwidth = check_kernels(report, options)
    if not options.kernels_only:
        check_end_to_end(report, options, bandwidth)
    sys.exit(0 if report.is_good else 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=["Q4_0", "Q8_0", "Q4_K", "Q6_K", "F16"], choices=list(DECODINGS))
    parser.add_argument("--columns", type=int, nargs="+", default=[1, 4, 16, 64, 256], choices=COLUMNS)
    parser.add_argument("--side", type=int, default=4096, help="rows and columns of the timed matrices")
    parser.add_argument("--gpu", default=FOUND, help="auto, or a simulated one for the models, as in strata run")
    parser.add_argument("--caps", nargs="+", default=["4GiB", "8GiB"], help="memory of the GPU that models may use")
    parser.add_argument("--model", type=Path, help="measure this file in place of generated ones")
    parser.add_argument("--draft", type=Path, help="a draft for --model")
    parser.add_argument("--folder", type=Path, help="where files are generated (about 20 GB)")
    parser.add_argument("--minutes", type=float, default=7.0, help="after which no run is begun any more")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--kernels-only", action="store_true", help="no models")
    parser.add_argument("--quick", action="store_true", help="goals of models are told but need not be reached")
    parser.add_argument("--json", action="store_true", help="JSON lines")
    return parser


if __name__ == "__main__":
    main()
