"""Models that come with the package: a small mixture of experts and a draft of the same vocabulary (see README.md)."""

from pathlib import Path

_FOLDER = Path(__file__).resolve().parent

DEMO_MODEL = _FOLDER / "strata-demo-moe-Q8_0.gguf"
DEMO_DRAFT = _FOLDER / "strata-demo-draft-F16.gguf"
