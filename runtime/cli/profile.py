"""`strata profile`: measures this machine once, shows what was found, and keeps it for the planner."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cpu_kernels.quant_types import QUANT_TYPES, QuantType
from cpu_kernels.tuning import Family
from gpu_kernels import capabilities
from offload.errors import FlashError
from offload.gguf import GGUFFile
from planner import document
from planner.budget import format_size, measure_budget
from planner.host import Host, read_host
from planner.machine import Machine
from planner.machine_here import machine_here
from planner.plot import plot_machine
from planner.profile import (
    Profile,
    load_or_measure,
    measure_apart,
    save,
    with_drive,
    with_gpu_rates,
    with_kernel_rates,
)
from runtime.cli.console import console, write_text
from runtime.cli.options import AsJson, model_path

COMMON_TYPES = ("F32", "F16", "Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q3_K", "Q2_K", "IQ4_XS", "MXFP4")


def command(
    *,
    model: Annotated[
        str | None, typer.Option("-m", "--model", help="Measure the drive of this file, and its quant types.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure everything again.")] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw roofline and drive to this file (the extra `plot`).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure this machine, and show what was found."""
    place = Path.cwd() if model is None else Path(model_path(model))
    profile = _measured(place, _types(place) if model is not None else _common(), again=again)
    machine = machine_here(profile, measure_budget(), place)
    if plot is not None:
        plot_machine(replace(machine, cpu=replace(machine.cpu, kernels=profile.kernels)), plot)
        console.print(f"drawn to {plot}", markup=False)
    if as_json:
        write_text(document.dumps(profile) + "\n")
    else:
        _show(Console(highlight=False), profile, machine, read_host())


def _measured(place: Path, types: list[QuantType], *, again: bool) -> Profile:
    """The stored profile with all that is missing measured, each step named while it runs."""
    with console.status("measuring memory and arithmetic"):
        if again:
            old, profile = load_or_measure(), measure_apart()
            profile = replace(profile, residuals=old.residuals, hits=old.hits, acceptances=old.acceptances)
            save(profile)
        else:
            profile = load_or_measure()
    with console.status(f"measuring the kernels of {len(types)} quant types"):
        profile = with_kernel_rates(profile, types)
    with console.status(f"measuring the drive of {place}"):
        try:
            profile = with_drive(profile, place)
        except OSError as error:
            raise FlashError(f"the drive of {place} cannot be measured: {error}", hint="name a file with -m") from error
    gpu = capabilities.detect()
    if gpu is not None:
        with console.status(f"measuring {gpu.name}"):
            profile = with_gpu_rates(profile, gpu)
    return profile


def _types(path: Path) -> list[QuantType]:
    with GGUFFile.open(path) as gguf:
        return sorted({tensor.quant_type for tensor in gguf.tensors.values()}, key=lambda kind: kind.name)


def _common() -> list[QuantType]:
    return [kind for kind in QUANT_TYPES.values() if kind.name in COMMON_TYPES]


def _show(out: Console, profile: Profile, machine: Machine, host: Host) -> None:
    """Tables of 80 columns: the machine, its kernels, its drive."""
    facts = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for name, value in _facts(profile, machine, host):
        facts.add_row(name, value)
    out.print(facts)
    kernels = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    kernels.add_column("kernels")
    kernels.add_column("by")
    for name in ("1 thread", f"{profile.threads} threads", "of reading", "prompts"):
        kernels.add_column(name, justify="right")
    choices = profile.tuning.choices if profile.tuning is not None else {}
    for name, points in sorted(profile.kernels.items()):
        rates = {(point.threads, point.columns): point for point in points}
        alone, every = rates[1, 1].bytes_per_s, rates[profile.threads, 1].bytes_per_s
        widest = max(columns for _, columns in rates)
        macs = rates[profile.threads, widest].macs_per_s / 1e9
        share = f"{every / profile.read_bytes_per_s:.0%}"
        family = choices[name].family if name in choices else Family.DOT
        kernels.add_row(name, family, f"{alone / 1e9:.1f} GB/s", f"{every / 1e9:.1f} GB/s", share, f"{macs:.0f} Gmac/s")
    out.print()
    out.print(kernels)
    if machine.flash is not None:
        out.print()
        out.print(_drive(machine))


def _facts(profile: Profile, machine: Machine, host: Host) -> Iterator[tuple[str, str]]:
    cores = f"{profile.threads} threads"
    if host.efficiency_cores:
        cores += f", {host.performance_cores} performance and {host.efficiency_cores} efficiency CPUs"
    if host.numa_nodes > 1:
        cores += f", {host.numa_nodes} NUMA nodes"
    yield "CPU", f"{profile.cpu_name}, {cores}"
    read = ", ".join(f"{point.at}: {point.bytes_per_s / 1e9:.1f}" for point in profile.read)
    yield "RAM", f"{format_size(machine.ram_bytes)} may be used; GB/s by threads: {read}"
    if profile.gpu is not None:
        yield "GPU", f"{profile.gpu.name}, reads {profile.gpu.matvec_bytes_per_s / 1e9:.0f} GB/s"
    else:
        why = capabilities.why_no_gpu()
        yield "GPU", f"none: {why.reason}" if why else "none"
    if host.on_battery is not None or host.power_mode:
        supply = {True: "on battery", False: "plugged in", None: ""}[host.on_battery]
        yield "power", ", ".join(text for text in (supply, host.power_mode) if text)


def _drive(machine: Machine) -> Table:
    """GB/s by size of a read and reads at a time, direct and through the page cache."""
    assert machine.flash is not None
    points = machine.flash.points
    depths = sorted({point.depth for point in points})
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("drive, GB/s")
    modes = sorted({point.direct for point in points}, reverse=True)
    for direct in modes:
        for depth in depths:
            table.add_column(f"{'direct' if direct else 'cached'} x{depth}", justify="right")
    rates = {(point.read_bytes, point.direct, point.depth): point.bytes_per_s for point in points}
    for size in sorted({point.read_bytes for point in points}):
        cells = [f"{rates[size, direct, depth] / 1e9:.2f}" for direct in modes for depth in depths]
        table.add_row(format_size(size), *cells)
    return table
