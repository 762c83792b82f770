"""What a simulated GPU is to be like, read from `sim:vram=4GiB,bw=192GB/s,link=6GB/s,tflops=6`. Knows no torch.

Optional: `launch=5us` (what starting a kernel takes) and `link_latency=10us` (what starting a copy takes).
"""

from dataclasses import dataclass

PREFIX = "sim:"
EXAMPLE = f"{PREFIX}vram=4GiB,bw=192GB/s,link=6GB/s,tflops=6"
LAUNCH_S = 5e-6  # from CUDA's guides: 2 to 10 microseconds
LINK_LATENCY_S = 10e-6

_SIZES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_RATES = {f"{unit}/s": factor for unit, factor in _SIZES.items()}
_TFLOPS = {"": 10**12}
_TIMES = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True, slots=True)
class SimulatedSpec:
    """Limits of a simulated GPU."""

    vram_bytes: int
    bytes_per_s: int  # of its memory
    link_bytes_per_s: int  # to it, and as many from it at the same time
    flops_per_s: int
    launch_s: float = LAUNCH_S
    link_latency_s: float = LINK_LATENCY_S

    @classmethod
    def parse(cls, text: str) -> "SimulatedSpec":
        """ValueError that names the part that is wrong."""
        if not text.startswith(PREFIX):
            raise ValueError(f"{text!r} is no simulated GPU, which is written as {EXAMPLE}")
        parts: dict[str, str] = {}
        for part in text.removeprefix(PREFIX).split(","):
            name, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals or name not in _PARTS:
                known = ", ".join(f"{part}=" for part in _PARTS)
                raise ValueError(f"{part.strip()!r} in {text!r} is none of {known}")
            if name in parts:
                raise ValueError(f"{name}= is given twice in {text!r}")
            parts[name] = value
        missing = [name for name in _NEEDED if name not in parts]
        if missing:
            raise ValueError(f"{', '.join(f'{name}=' for name in missing)} is missing in {text!r}")
        values = {name: _number(name, value) for name, value in parts.items()}
        return cls(
            vram_bytes=round(values["vram"]),
            bytes_per_s=round(values["bw"]),
            link_bytes_per_s=round(values["link"]),
            flops_per_s=round(values["tflops"]),
            launch_s=round(values.get("launch", LAUNCH_S), 12),
            link_latency_s=round(values.get("link_latency", LINK_LATENCY_S), 12),
        )

    @property
    def text(self) -> str:
        """As `parse` reads it."""
        unit = next(name for name in ("GiB", "MiB", "KiB", "B") if self.vram_bytes % _SIZES[name] == 0)
        rates = ",".join(
            f"{name}={_plain(rate / 1e9)}GB/s"
            for name, rate in (("bw", self.bytes_per_s), ("link", self.link_bytes_per_s))
        )
        text = f"{PREFIX}vram={self.vram_bytes // _SIZES[unit]}{unit},{rates},tflops={_plain(self.flops_per_s / 1e12)}"
        if self.launch_s != LAUNCH_S:
            text += f",launch={_plain(self.launch_s * 1e6)}us"
        if self.link_latency_s != LINK_LATENCY_S:
            text += f",link_latency={_plain(self.link_latency_s * 1e6)}us"
        return text


_NEEDED = ("vram", "bw", "link", "tflops")
_PARTS: dict[str, dict[str, float]] = {
    **{"vram": dict(_SIZES), "bw": dict(_RATES), "link": dict(_RATES), "tflops": dict(_TFLOPS)},
    **{"launch": _TIMES, "link_latency": _TIMES},
}


def _number(name: str, text: str) -> float:
    """A number with one of the units of this part, in the unit without a prefix."""
    units = _PARTS[name]
    unit = max((unit for unit in units if text.endswith(unit)), key=len, default=None)
    example = next(reversed(units))
    if unit is None:
        raise ValueError(f"{name}={text!r} needs a unit, as in {name}=4{example}")
    try:
        number = float(text.removesuffix(unit)) * units[unit]
    except ValueError:
        raise ValueError(f"{name}={text!r} is not a number with a unit, as in {name}=4{example}") from None
    least = 1 if name in _NEEDED else 0
    if not least <= number < float(1 << 62):
        raise ValueError(f"{name}={text!r} is out of range")
    return number


def _plain(value: float) -> str:
    """A float that is read back as it was, without an exponent or trailing zeros."""
    return f"{round(value, 12):.12f}".rstrip("0").rstrip(".")
