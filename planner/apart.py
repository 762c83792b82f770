"""Measurements made in a process of their own: neither their memory nor what they import counts as the caller's.

Knows nothing about what is measured.
"""

import json
import subprocess
import sys
from typing import TypeVar

from planner import document

T = TypeVar("T")

FAILURES = (OSError, subprocess.SubprocessError, ValueError)

_CODE = """
import json, sys
from importlib import import_module
from planner import document
print(document.dumps(import_module(sys.argv[1]).measure(*json.loads(sys.argv[2]))))
"""


def measured_apart(cls: type[T], module: str, *arguments: object, limit_s: float) -> T:
    """The `cls` that `measure(*arguments)` of that module gives there; `arguments`: what JSON can say.

    One of `FAILURES` where that fails or takes longer.
    """
    command = [sys.executable, "-c", _CODE, module, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=True)
    return document.loads(cls, done.stdout)
