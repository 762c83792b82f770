"""Numbers for people: counts, rates, durations. Sizes in bytes are written by `planner.budget`."""


def count(number: int) -> str:
    """A number of parameters: 16.8M, 7.2B."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)


def figures(number: float) -> str:
    """Three figures, two below 0.1."""
    if number < 0.1:
        return f"{number:.2g}"
    return f"{number:.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"


def duration(seconds: float) -> str:
    """Minutes, seconds, milliseconds or microseconds, in three figures."""
    if seconds >= 120:
        return f"{seconds / 60:.1f} min"
    if seconds >= 1:
        return f"{figures(seconds)} s"
    return f"{figures(1e3 * seconds)} ms" if seconds >= 1e-3 else f"{figures(1e6 * seconds)} us"


def plural(number: int, noun: str) -> str:
    """`noun` as it stands behind `number`."""
    return noun if number == 1 else f"{noun}s"
