"""The folders that strata keeps files in: the cache of what it can make again, and what lies in it.

Knows nothing about the files themselves.
"""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where strata keeps what it can make again: `$XDG_CACHE_HOME/strata`, by default under `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    return folder / "strata"


def spill_folder() -> Path:
    """Where the files lie that keys and values go to which RAM has no room for."""
    return cache_folder() / "kv-spill"


def stores_folder(folder: Path | None = None) -> Path:
    """Where the stores of models lie that stream from flash: `folder`, or the usual one for None."""
    return cache_folder() / "stores" if folder is None else folder
