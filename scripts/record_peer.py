"""Records llama.cpp's logits of the generated models, so that tests compare with them where llama.cpp is not installed.

Run it from the repository's root with llama-cpp-python installed: python -m scripts.record_peer
It writes tests/data/peer/NAME.npz: for every quant type the logits of the last 16 of 64 positions (float32 for F32
and F16 models, float16 for the rest) and the SHA-256 of the generated file, the token ids, the peer's version.
"""

import hashlib
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.support import models, peer
from tests.support.divergence import EXACT_TYPES

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "data" / "peer"
POSITIONS = 16


def main() -> None:
    """Records every case."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    ids = models.prompt()
    records: dict[str, dict[str, np.ndarray]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, quant_type in models.cases():
            path = models.write_model(Path(folder) / f"{name}-{quant_type}.gguf", models.spec_of(name), quant_type)
            logits = peer.logits_of(path, ids)[-POSITIONS:]
            record = records.setdefault(name, {"ids": np.array(ids), "version": np.array(peer.version())})
            record[f"{quant_type}_logits"] = logits.astype(np.float32 if quant_type in EXACT_TYPES else np.float16)
            record[f"{quant_type}_sha256"] = np.array(hashlib.sha256(path.read_bytes()).hexdigest())
            path.unlink()
    for name, record in records.items():
        np.savez_compressed(FOLDER / f"{name}.npz", **record)
    total = sum(file.stat().st_size for file in FOLDER.glob("*.npz"))
    sys.stdout.write(f"{len(records)} files, {total / 1e6:.2f} MB in {FOLDER}\n")


if __name__ == "__main__":
    main()
