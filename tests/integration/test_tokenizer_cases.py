"""llama.cpp's own tokenizer cases: texts and the ids it gives for them, for every vocabulary beside the repository."""

from pathlib import Path

import pytest

from runtime.tokenizer import Tokenizer

SEPARATOR = "\n__ggml_vocab_test__\n"
FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data" / "tokenizer_cases"
NAMES = sorted(path.name.removesuffix(".inp") for path in FOLDER.glob("*.inp"))


@pytest.mark.parametrize("name", NAMES or ["none"])
def test_ids(shared_data: Path, name: str) -> None:
    path = shared_data / "tokenizer_cases" / name
    texts = Path(f"{path}.inp").read_bytes().decode().removesuffix(SEPARATOR).split(SEPARATOR)
    lines = Path(f"{path}.out").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    assert len(texts) == len(lines)
    tokenizer = Tokenizer.from_gguf(path)
    for text, line in zip(texts, lines, strict=True):
        ids = tokenizer.encode(text, add_special=False)
        assert ids == [int(token_id) for token_id in line.split()], repr(text)
        assert tokenizer.decode(ids) == text
