"""What a run says about weights that were read from flash: how much, and whether guesses of what comes next paid."""

from offload.cache_counts import CacheCounts
from planner.budget import format_size
from planner.figures import figures


def describe_streaming(counts: CacheCounts) -> str:
    """One line: bytes read, the part of what was lacking that was foreseen, what was read in vain, the newest trial."""
    parts = [f"{format_size(counts.bytes_read)} read from flash"]
    if counts.foreseen:
        recall = f"{counts.foreseen_recall:.0%} of what was lacking was read ahead on a guess"
        parts.append(f"{recall}, {format_size(counts.wasted_bytes)} in vain")
    if counts.trial is not None:
        state = "on" if counts.trial.is_won else "off"
        times = (figures(1e3 * seconds) for seconds in (counts.trial.open_s, counts.trial.closed_s))
        parts.append("guesses are {}: {} ms a token with them, {} without".format(state, *times))
    return "; ".join(parts)
