"""Run a model under many random memory limits: each run must answer or refuse, and none may be killed.

    python scripts/check_memory_limits.py MODEL.gguf [--runs 100] [--least-mib 300] [--most-mib 2000] [--seed 1]

Each run is `strata run` of a short prompt in a memory control group of its own (version 1; needs root). Prints one line
a run: limit, the group's peak, what happened; then how many answered and how many were refused. Exit code 1 if one was
killed or failed otherwise. Answers must be the same text whatever the limit.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

from scripts.bench_streamed import control_group

TOKENS = 12


def run(model: Path, limit_mib: int) -> tuple[str, str, float]:
    """(what happened, the answer, the group's peak in MiB)."""
    command = [
        sys.executable,
        "-m",
        "runtime.cli",
        "run",
        "-m",
        str(model),
        "-p",
        "the thing in the inn",
        "--temp",
        "0",
    ]
    command += ["-n", str(TOKENS), "-c", "256", "--json", "-q"]
    with control_group(limit_mib) as group:

        def enter() -> None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

        done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=enter, timeout=300)
        peak = int((group / "memory.max_usage_in_bytes").read_text()) / 2**20
    if done.returncode == 0:
        return "answered", json.dumps(json.loads(done.stdout)["token_ids"]), peak
    if done.returncode == 1 and "may be used (control group limit" in done.stderr:
        return "refused", "", peak
    return f"failed with {done.returncode}: {done.stderr.strip()[-200:]}", "", peak


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--least-mib", type=int, default=300)
    parser.add_argument("--most-mib", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    outcomes: Counter[str] = Counter()
    answers: set[str] = set()
    for number in range(options.runs):
        limit = draw.randint(options.least_mib, options.most_mib)
        outcome, answer, peak = run(options.model, limit)
        outcomes[outcome.split(":")[0]] += 1
        answers |= {answer} - {""}
        print(f"{number:3} limit {limit:5} MiB, peak {peak:6.0f} MiB: {outcome}", flush=True)
    print(dict(outcomes), f"{len(answers)} different answers")
    if outcomes.keys() - {"answered", "refused"} or len(answers) != 1:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
