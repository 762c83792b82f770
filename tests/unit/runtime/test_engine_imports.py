"""What an engine brings into a process: plans for the CPU count no torch."""

import subprocess
import sys
from pathlib import Path

from tests.support.models import FAMILIES, write_model


def test_engines_on_the_cpu_import_no_torch(tmp_path: Path) -> None:
    path = write_model(tmp_path / "llama.gguf", FAMILIES["llama"], "Q8_0")
    code = (
        "import sys; from runtime.engine import Engine\n"
        "with Engine(sys.argv[1], threads=1, gpu='off') as engine:\n"
        "    list(engine.generate([1, 2, 3], max_tokens=2))\n"
        "assert not {'torch', 'matplotlib'} & sys.modules.keys()"
    )
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
