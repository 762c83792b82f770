"""`strata doctor`: what this machine has, what strata makes of it, and the command that mends what is missing."""

import importlib.metadata
import importlib.util
import platform
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape

from gpu_kernels import capabilities
from gpu_kernels.gpu_path import gpu_path
from planner import gpu_products
from planner.budget import format_size, measure_budget
from planner.folders import cache_folder
from planner.profile import load_or_measure
from runtime.cli import options
from runtime.cli.console import write_json

REQUIRED = ("numpy", "torch", "numba", "tokenizers", "jinja2", "gguf", "psutil", "zstandard")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report; `mend` is the command or step that improves it."""

    name: str
    good: bool
    value: str
    mend: str | None = None


def command(as_json: options.AsJson = False) -> None:
    """Check this machine and this installation."""
    findings = [*_packages(), _cpu(), _memory(), *_gpu(), _peer(), _profile()]
    if as_json:
        write_json([_document(finding) for finding in findings])
        return
    console = Console(highlight=False)
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        mark = "[green]ok[/]" if finding.good else "[yellow]--[/]"
        console.print(f"{mark}  {finding.name:<{width}}  {escape(finding.value)}", soft_wrap=True)
        if finding.mend:
            console.print(f"    {'':<{width}}  [dim]{escape(finding.mend)}[/]", soft_wrap=True)


def _packages() -> list[Finding]:
    findings = [Finding("python", True, platform.python_version())]
    for name in REQUIRED:
        try:
            findings.append(Finding(name, True, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(name, False, "not installed", f"pip install {name}"))
    return findings


def _cpu() -> Finding:
    profile = load_or_measure()
    rate = profile.read_rate(profile.threads) / 1e9
    return Finding("cpu", True, f"{profile.cpu_name}, {profile.threads} threads, reads {rate:.1f} GB/s")


def _memory() -> Finding:
    budget = measure_budget()
    return Finding("memory", True, f"{format_size(budget.ram_bytes)} may be used ({budget.ram_source})")


def _gpu() -> list[Finding]:
    gpu = capabilities.detect()
    if gpu is None:
        why = capabilities.why_no_gpu()
        return [Finding("gpu", False, why.reason, why.mend) if why else Finding("gpu", False, "not usable")]
    path = gpu_path(gpu)
    room = f"{format_size(gpu.free_bytes)} of {format_size(gpu.total_bytes)} free"
    return [
        Finding("gpu", True, f"{gpu.name}, {room}"),
        Finding("gpu path", path.mend is None and path.shares_steps, path.text, path.mend),
        *_gpu_products(gpu.name),
    ]


def _gpu_products(gpu: str) -> list[Finding]:
    """Which kernels multiply how many columns, as far as that was measured."""
    ways = gpu_products.known_ways(gpu)
    return [Finding("gpu products", True, gpu_products.describe(ways))] if ways else []


def _peer() -> Finding:
    if importlib.util.find_spec("llama_cpp") is None:
        return Finding(
            "llama.cpp", False, "not installed: --engine llama.cpp is off", "pip install 'strata[peer]' (builds it)"
        )
    return Finding("llama.cpp", True, importlib.metadata.version("llama-cpp-python"))


def _profile() -> Finding:
    return Finding("profile", True, str(cache_folder()))


def _document(finding: Finding) -> dict[str, Any]:
    return {"name": finding.name, "ok": finding.good, "value": finding.value, "mend": finding.mend}
