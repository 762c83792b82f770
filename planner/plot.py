"""Pictures of a machine: a roofline with the quant types' products on it, and its drive by read size.

Needs the extra `plot` (matplotlib). Knows nothing about how figures were measured.
"""

from pathlib import Path

from offload.errors import RequestError
from planner.machine import Machine


def plot_machine(machine: Machine, path: Path) -> None:
    """Write the picture to `path`, in the form its suffix names. RequestError without matplotlib, or where it fails."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise RequestError(
            "pictures need matplotlib, which is not installed", hint="pip install 'strata[plot]'"
        ) from error
    flash = machine.flash
    figure = Figure(figsize=(12, 5) if flash else (6.5, 5), layout="constrained")
    axes = figure.subplots(1, 2 if flash else 1, squeeze=False)[0]
    _roofline(axes[0], machine)
    if flash:
        _drive(axes[1], machine)
    figure.suptitle(machine.name)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise RequestError(f"cannot write the picture {path}: {error}") from error


def _roofline(axes, machine: Machine) -> None:  # type: ignore[no-untyped-def]
    """Multiplications a second over multiplications a byte: measured points below bandwidth and peak."""
    cpu = machine.cpu
    read = cpu.read[-1].bytes_per_s
    most = max(point.threads for points in cpu.kernels.values() for point in points)
    peak = max(point.macs_per_s for points in cpu.kernels.values() for point in points)
    for name, points in sorted(cpu.kernels.items()):
        chosen = [point for point in points if point.threads == most]
        intensity = [point.macs_per_s / point.bytes_per_s for point in chosen]
        axes.plot(intensity, [point.macs_per_s / 1e9 for point in chosen], marker="o", markersize=4, label=name)
    low, high = 0.1, 2000.0
    turn = peak / read
    axes.plot([low, turn, high], [low * read / 1e9, peak / 1e9, peak / 1e9], color="black", linewidth=1, label="limits")
    axes.set(xscale="log", yscale="log", xlabel="multiplications a byte of weights", ylabel="Gmac/s")
    axes.set_title(f"Products, {most} threads")
    axes.legend(fontsize="x-small", ncols=2)


def _drive(axes, machine: Machine) -> None:  # type: ignore[no-untyped-def]
    """Bandwidth over the size of a read, a line for each depth and mode."""
    assert machine.flash is not None
    lines = sorted({(point.direct, point.depth) for point in machine.flash.points})
    for direct, depth in lines:
        points = [point for point in machine.flash.points if (point.direct, point.depth) == (direct, depth)]
        points.sort(key=lambda point: point.read_bytes)
        label = f"{'direct' if direct else 'buffered'}, {depth} at a time"
        sizes = [point.read_bytes / 1024 for point in points]
        axes.plot(
            sizes, [point.bytes_per_s / 1e9 for point in points], "-" if direct else "--", marker="o", label=label
        )
    axes.set(xscale="log", xlabel="KiB a read", ylabel="GB/s", title=machine.flash.name)
    axes.legend(fontsize="x-small")
