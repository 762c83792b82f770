"""Compare strata with llama.cpp on trained models: greedy text and perplexity, as a markdown table.

    python scripts/check_models.py FOLDER --text TEXT [--tokens 100] [--context 512]

Needs the extra `peer`. Every GGUF file under FOLDER is run by both; where texts part, the gap between the peer's two
likeliest tokens at that place is shown: below about 0.1 it is a near tie that rounding decides.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime.engine import Engine
from runtime.perplexity import perplexity
from runtime.sampler import SamplingParams

PROMPT = "Once upon a time"
GREEDY = SamplingParams(temperature=0)


@dataclass(frozen=True)
class Comparison:
    """What both said of one file."""

    name: str
    text: str
    ours: float
    theirs: float

    def row(self) -> str:
        """A line of the table."""
        change = 100 * (self.ours / self.theirs - 1)
        return f"| {self.name} | {self.text} | {self.ours:.4f} | {self.theirs:.4f} | {change:+.3f}% |"


def compare(path: Path, text: str, *, tokens: int, context: int, loop: str) -> Comparison:
    """Run a file by our loop and by llama.cpp."""
    with (
        Engine(path, loop=loop, context_tokens=context, threads=1) as ours,
        Engine(path, loop="llama.cpp", context_tokens=context, threads=1) as theirs,
    ):
        prompt = ours.prompt_ids(PROMPT)
        said = [
            [piece.token_id for piece in one.generate(prompt, max_tokens=tokens, sampling=GREEDY)]
            for one in (ours, theirs)
        ]
        return Comparison(
            path.name,
            _agreement(said[0], said[1], prompt, theirs),
            _perplexity(ours, text, context),
            _perplexity(theirs, text, context),
        )


def _agreement(ours: Sequence[int], theirs: Sequence[int], prompt: Sequence[int], peer: Engine) -> str:
    for place, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one != other:
            top = np.sort(peer.logits([*prompt, *theirs[:place]])[-1])
            return f"same for {place} tokens, then a gap of {top[-1] - top[-2]:.3f}"
    return f"same, {len(ours)} tokens"


def _perplexity(engine: Engine, text: str, context: int) -> float:
    bos_id = engine.tokenizer.bos_id if engine.tokenizer.add_bos else None
    return perplexity(engine.logits, engine.tokenizer.encode(text), context_tokens=context, bos_id=bos_id).value


def main() -> None:
    """Compare every file of the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--loop", default="sequential")
    options = parser.parse_args()
    text = options.text.read_text(encoding="utf-8")
    print("| file | greedy text | perplexity | llama.cpp's | difference |")
    print("| --- | --- | ---: | ---: | ---: |")
    for path in sorted(options.folder.rglob("*.gguf")):
        found = compare(path, text, tokens=options.tokens, context=options.context, loop=options.loop)
        print(found.row(), flush=True)


if __name__ == "__main__":
    main()
