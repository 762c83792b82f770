"""How much memory a plan may use: the tightest of control group limits, free memory and what the user allows.

Knows nothing about models. Also the one place that reads and writes sizes such as "8GiB". Control groups are read in
both versions, walking from the process's own group up to the root, as every level's limit holds.

Invariant: `ram_bytes` and `gpu_bytes` are for this process as a whole, what it holds already included, but for what it
holds beyond all that plans count for a process: that stays with whoever else uses it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from gpu_kernels import capabilities
from gpu_kernels.capabilities import GpuCapabilities
from offload.errors import RequestError

MIB = 1 << 20
GIB = 1 << 30
_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": MIB, "g": GIB, "t": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([bkmgt]?)(?:i?b)?", re.ASCII)
_MAX_BYTES = 1 << 60
_UNLIMITED_BYTES = 1 << 60  # version 1 writes "no limit" as the largest page-aligned 63-bit number

RAM_MARGIN = 0.05  # of what is free: other programs grow while a model runs
RAM_MARGIN_MIN_BYTES = 128 * MIB
RAM_MARGIN_MAX_BYTES = 2 * GIB
GPU_MARGIN_BYTES = 256 * MIB
GPU_MARGIN_PART = 16  # of a GPU's memory, where that is less
# What plans count for Python and what the command imports: with weights packed for the CPU's kernels, without torch, at
# most 240 MiB resident, buffers and the demo model (15) included. With torch 359 MiB, before a model is loaded.
PACKED_PROCESS_BYTES = 205 * MIB
# With a CUDA context; not measured by us, taken with room.
GPU_PROCESS_RAM_BYTES = 3 << 30


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes a plan may use. The margins are inside: a plan leaves them free."""

    ram_bytes: int
    gpu_bytes: int
    ram_source: str
    gpu_source: str
    ram_margin_bytes: int = 0
    gpu_margin_bytes: int = 0

    def within(self, machine: "Budget") -> "Budget":
        """This budget, but no more than `machine` has: a run may not use what is not there."""
        smaller = self
        if machine.ram_bytes < self.ram_bytes:
            smaller = replace(
                smaller,
                ram_bytes=machine.ram_bytes,
                ram_source=machine.ram_source,
                ram_margin_bytes=machine.ram_margin_bytes,
            )
        if machine.gpu_bytes < self.gpu_bytes:
            smaller = replace(
                smaller,
                gpu_bytes=machine.gpu_bytes,
                gpu_source=machine.gpu_source,
                gpu_margin_bytes=machine.gpu_margin_bytes,
            )
        return smaller


def measure_budget(gpu: GpuCapabilities | None = None, *, root: Path = Path("/")) -> Budget:
    """What this machine can give now: RAM by control group and free memory, and the free memory of the GPU.

    Without `gpu` there is none to be used.
    """
    free_bytes, ram_source = free_ram(root)
    held_bytes = int(psutil.Process().memory_info().rss)
    ram_bytes = free_bytes + min(held_bytes, GPU_PROCESS_RAM_BYTES if gpu else PACKED_PROCESS_BYTES)
    margin = min(max(int(RAM_MARGIN * ram_bytes), RAM_MARGIN_MIN_BYTES), RAM_MARGIN_MAX_BYTES, ram_bytes)
    return Budget(
        ram_bytes=ram_bytes,
        gpu_bytes=gpu.free_bytes if gpu else 0,
        ram_source=ram_source,
        gpu_source=gpu.name if gpu else "no GPU",
        ram_margin_bytes=margin,
        gpu_margin_bytes=min(GPU_MARGIN_BYTES, gpu.free_bytes // GPU_MARGIN_PART) if gpu else 0,
    )


def free_ram(root: Path = Path("/")) -> tuple[int, str]:
    """(bytes that this process may still take, what limits them): free memory, or a control group's limit.

    `root` stands for "/" in tests. 0.2 ms: not for every token.
    """
    free = psutil.virtual_memory().available, "free memory"
    group = cgroup_free_bytes(root)
    return group if group is not None and group[0] < free[0] else free


def parse_budget(text: str, machine: Budget | None = None) -> Budget:
    """The budget a user asks for, as in "ram=8GiB,gpu=4GiB"; what is not named is as `machine` has it.

    Amounts asked for are taken as they are, without a margin. RequestError for anything else.
    """
    machine = machine if machine is not None else measure_budget(capabilities.detect())
    budget = machine
    seen: set[str] = set()
    for item in text.split(","):
        name, equals, size = (part.strip() for part in item.partition("="))
        name = name.lower()
        if not equals or name not in ("ram", "gpu") or name in seen:
            raise RequestError(
                f"budget {text!r} is not understood at {item!r}", hint="write it as --budget ram=8GiB,gpu=4GiB"
            )
        seen.add(name)
        num_bytes = parse_size(size)
        if name == "ram":
            budget = replace(budget, ram_bytes=num_bytes, ram_source="--budget", ram_margin_bytes=0)
        else:
            budget = replace(budget, gpu_bytes=num_bytes, gpu_source="--budget", gpu_margin_bytes=0)
    return budget


def parse_size(text: str) -> int:
    """Bytes of a size such as "8GiB", "512M" or "1.5 g": units are powers of 1024; RequestError for anything else."""
    match = _SIZE.fullmatch(text.strip().lower())
    num_bytes = int(float(match[1]) * _UNITS[match[2]]) if match and len(match[1]) <= 20 else _MAX_BYTES + 1
    if num_bytes > _MAX_BYTES:
        raise RequestError(f"{text!r} is not a size", hint="write sizes as 8GiB, 512MiB or a number of bytes")
    return num_bytes


def format_size(num_bytes: int) -> str:
    """`num_bytes` for people: three figures or so, in GiB, MiB, KiB or bytes."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (1 << 10, "KiB")):
        if num_bytes >= unit:
            amount = num_bytes / unit
            return f"{amount:.0f} {name}" if amount >= 100 else f"{amount:.1f} {name}"
    return f"{num_bytes} B"


def cgroup_free_bytes(root: Path = Path("/")) -> tuple[int, str] | None:
    """(bytes left, source) under the tightest memory limit of the control groups this process is in, if any.

    What the kernel can drop at once (inactive file cache) counts as free. `root` stands for "/" in tests.
    """
    tightest: tuple[int, str] | None = None
    for mount, group, limit_name, use_name in _memory_groups(root):
        for folder in _upwards(mount, group):
            limit = _read_int(folder / limit_name)
            if limit is None or limit >= _UNLIMITED_BYTES:
                continue
            used = (_read_int(folder / use_name) or 0) - _inactive_file_bytes(folder)
            free = max(limit - max(used, 0), 0)
            if tightest is None or free < tightest[0]:
                tightest = (free, f"control group limit of {format_size(limit)}")
    return tightest


def cgroup_cpu_quota(root: Path = Path("/")) -> float | None:
    """CPUs' worth of time the control groups of this process allow, None without a limit."""
    quotas: list[float] = []
    for mount, group, _ in _groups(root, "cpu"):
        for folder in _upwards(mount, group):
            words = (_read_text(folder / "cpu.max") or "").split()
            quota = _read_int(folder / "cpu.cfs_quota_us")
            period = _read_int(folder / "cpu.cfs_period_us")
            if len(words) == 2 and words[0].isdigit() and words[1].isdigit():
                quota, period = int(words[0]), int(words[1])
            if quota is not None and period is not None and quota > 0 and period > 0:
                quotas.append(quota / period)
    return min(quotas, default=None)


def _memory_groups(root: Path) -> Iterator[tuple[Path, str, str, str]]:
    """(mount point, group, file of the limit, file of the use) of each hierarchy that limits memory."""
    for mount, group, unified in _groups(root, "memory"):
        if unified:
            yield mount, group, "memory.max", "memory.current"
            yield mount, group, "memory.high", "memory.current"
        else:
            yield mount, group, "memory.limit_in_bytes", "memory.usage_in_bytes"


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, str, bool]]:
    """(mount point, group, whether of version 2) of this process in each hierarchy that may limit `controller`."""
    base = root / "sys/fs/cgroup"
    for line in (_read_text(root / "proc/self/cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number == "0" and not controllers:
            yield base / "unified" if (base / "unified").is_dir() else base, group, True
        elif controller in controllers.split(","):
            yield base / controllers if (base / controllers).is_dir() else base / controller, group, False


def _upwards(mount: Path, group: str) -> list[Path]:
    """The folders of `group` and of all groups around it, up to the mount point.

    A container often sees its own group as the mount point while its name is still told from outside: a folder that
    is not there is passed over.
    """
    parts = [part for part in group.split("/") if part not in ("", ".", "..")]
    return [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def _inactive_file_bytes(folder: Path) -> int:
    for line in (_read_text(folder / "memory.stat") or "").splitlines():
        name, _, value = line.partition(" ")
        if name in ("total_inactive_file", "inactive_file") and value.isdigit():
            return int(value)
    return 0


def _read_int(path: Path) -> int | None:
    text = (_read_text(path) or "").strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _read_text(path: Path) -> str | None:
    """The text of a system file; None where the kernel does not offer it."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
