"""Run a model under many random memory limits: each run must answer or refuse, and none may be killed.

    python scripts/check_memory_limits.py MODEL.gguf [--runs 100] [--least-mib 300] [--most-mib 2000] [--seed 1]
        [--context 256] [--prompt-words 5] [--kv f16]

Each run is `strata run` in a memory control group of its own (version 1; needs root). Prints one line a run: limit, the
group's peak, the page cache included, what happened, and of an answer the tokens of the prompt, what the process itself
had in RAM at most and what was predicted; then how many answered and how many were refused. Exit code 1 if one was
killed, passed its limit or failed otherwise. Answers must be the same text whatever the limit; `--kv` keeps keys and
values in one type, without which plans may choose types that answer otherwise. One limit for a long context:

    python scripts/check_memory_limits.py MODEL.gguf --runs 1 --least-mib 1300 --most-mib 1300 --context 131072
        --prompt-words 4000 --kv f16
"""

import argparse
import json
import os
import random
import subprocess
import sys
from collections import Counter
from itertools import cycle, islice
from pathlib import Path

from scripts.bench_streamed import control_group

TOKENS = 12
WORDS = ("the", "thing", "in", "the", "inn")


def run(options: argparse.Namespace, limit_mib: int) -> tuple[str, str, float]:
    """(what happened, with figures behind a colon; the answer; the group's peak in MiB)."""
    prompt = " ".join(islice(cycle(WORDS), options.prompt_words))
    command = [sys.executable, "-m", "runtime.cli", "run", "-m", str(options.model), "-f", "-", "--temp", "0"]
    command += ["-n", str(TOKENS), "-c", str(options.context), "--gpu", "off", "--json", "-q"]
    if options.kv is not None:
        command += ["-ctk", options.kv, "-ctv", options.kv]
    with control_group(limit_mib) as group:

        def enter() -> None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

        done = subprocess.run(
            command, input=prompt, capture_output=True, text=True, check=False, preexec_fn=enter, timeout=600
        )
        peak = int((group / "memory.max_usage_in_bytes").read_text()) / 2**20
    if peak > limit_mib:
        return "passed its limit", "", peak
    if done.returncode == 0:
        answer = json.loads(done.stdout)
        resident, predicted = (answer[of]["peak_ram_bytes"] >> 20 for of in ("measured", "predicted"))
        figures = f"{answer['prompt_tokens']} tokens, {resident} MiB resident, {predicted} MiB predicted"
        return f"answered: {figures}", json.dumps(answer["token_ids"]), peak
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
    parser.add_argument("--context", type=int, default=256, help="tokens")
    parser.add_argument("--prompt-words", type=int, default=len(WORDS))
    parser.add_argument("--kv", help="the type of keys and values; the plan's if none is given")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    outcomes: Counter[str] = Counter()
    answers: set[str] = set()
    for number in range(options.runs):
        limit = draw.randint(options.least_mib, options.most_mib)
        outcome, answer, peak = run(options, limit)
        outcomes[outcome.split(":")[0]] += 1
        answers |= {answer} - {""}
        print(f"{number:3} limit {limit:5} MiB, peak {peak:6.0f} MiB: {outcome}", flush=True)
    print(dict(outcomes), f"{len(answers)} different answers")
    if outcomes.keys() - {"answered", "refused"} or len(answers) != 1:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
