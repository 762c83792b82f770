"""Documents that must follow the code."""

import re
from pathlib import Path

import pytest
from typer.main import get_command

from runtime.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("runtime", "planner", "offload", "cpu_kernels", "gpu_kernels")


@pytest.mark.parametrize("package", PACKAGES)
def test_the_architecture_names_every_file(package):
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    section = text.split(f"\n### {package}\n")[1].split("\n### ")[0]
    named = set(re.findall(r"^\| `([\w/]+\.py)`", section, re.MULTILINE))
    there = {
        str(path.relative_to(ROOT / package)) for path in (ROOT / package).rglob("*.py") if path.name != "__init__.py"
    }
    assert named == there


def test_the_readme_names_every_command():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in get_command(app).commands:  # type: ignore[attr-defined]
        assert f"`strata {name}" in text, name
