"""Run a batch with the fake engine: `python -m tests.support.batch_worker INPUT OUTPUT DELAY_S PARALLEL`.

Prints the summary. A test kills it, interrupts it, or takes its disk space away.
"""

import sys

from offload.errors import StrataError
from runtime.batch import run_batch
from tests.support.batch_engine import FakeEngine


def main() -> int:
    """One run; 1 with the error on stderr where it fails, 130 where it was interrupted."""
    source, output, delay_s, parallel = sys.argv[1:]
    try:
        summary = run_batch(FakeEngine(delay_s=float(delay_s)), source, output, parallel=int(parallel))
    except StrataError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    sys.stdout.write(summary.describe() + "\n")
    return 130 if summary.interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
