"""Measure the RAM that vocabularies take: generated ones by tokens and merges, each in a process of its own.

    python scripts/measure_vocabulary.py [--tokens 32000 128000] [--merges-per-token 0 1 2.2]

Prints JSON lines: bytes held once the vocabulary is built, and at the peak while it is, beyond those of a vocabulary of
256 tokens. The planner's `VOCABULARY_BYTES_PER_TOKEN` and `VOCABULARY_BYTES_PER_MERGE` lie above what this measures.
Linux only: it reads /proc.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf

LETTERS = "etaoi"
KINDS = ("gpt2", "llama", "t5", "bert")
HELD, PEAK = "VmRSS:", "VmHWM:"


def tokens_of(count: int) -> list[str]:
    """The first `count` texts over five letters, shortest first: every part of a token is a token."""
    words = ("".join(word) for length in itertools.count(1) for word in itertools.product(LETTERS, repeat=length))
    return list(itertools.islice(words, count))


def merges_of(tokens: list[str], count: int) -> list[str]:
    """`count` merges: each token first by its last letter, then by its last two, and so on."""
    splits = (f"{token[:-cut]} {token[-cut:]}" for cut in itertools.count(1) for token in tokens if len(token) > cut)
    return list(itertools.islice(splits, count))


def write(path: Path, kind: str, tokens: list[str], merges: list[str]) -> None:
    """A GGUF file with the vocabulary alone."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    marked = {"llama": ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))], "t5": ["<pad>", "</s>", "<unk>"]}
    special = marked.get(kind, ["[UNK]"])
    writer.add_token_list([*special, *tokens])
    writer.add_token_types([2] + [6 if len(special) > 9 else 3] * (len(special) - 1) + [1] * len(tokens))
    writer.add_token_scores([-float(place) for place in range(len(special) + len(tokens))])
    if kind == "gpt2":
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges(merges or ["e t"])
    writer.add_unk_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def measured(path: Path) -> dict[str, int]:
    """Bytes that a fresh process holds, and held at most, once it has built the file's tokenizer and used it."""
    code = (
        "import sys; from offload.gguf import GGUFFile; from runtime.text import ModelText\n"
        "with GGUFFile.open(sys.argv[1]) as file, ModelText(file) as text:\n"
        "    text.prompt_ids('tea to eat at ten ' * 200)\n"
        "    print(open('/proc/self/status').read())"
    )
    shown = subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True).stdout
    lines = {line.split()[0]: line.split()[1] for line in shown.splitlines() if line.startswith((HELD, PEAK))}
    return {name: int(lines[name]) << 10 for name in (HELD, PEAK)}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32_000, 128_000, 256_000])
    parser.add_argument("--merges-per-token", type=float, nargs="+", default=[0.0, 1.0, 2.2])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        for kind in KINDS:
            write(path, kind, tokens_of(256), [])
            least = measured(path)
            for count in options.tokens:
                for share in options.merges_per_token if kind == "gpt2" else [0.0]:
                    tokens = tokens_of(count)
                    merges = merges_of(tokens, int(share * count))
                    write(path, kind, tokens, merges)
                    found = measured(path)
                    held, peak = (found[name] - least[name] for name in (HELD, PEAK))
                    row = {"kind": kind, "tokens": count, "merges": len(merges), "held_bytes": held, "peak_bytes": peak}
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
