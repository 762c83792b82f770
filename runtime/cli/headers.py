"""Opens the header of a model that a command line names, here or on a server; for commands that need no weights."""

from offload.gguf import GGUFFile
from runtime.cli.console import console
from runtime.cli.options import model_path
from runtime.cli.remote_names import is_remote, remote_file


def open_header(name: str) -> GGUFFile:
    """The model's file or files; of one on a server the header is fetched and nothing else can be read."""
    if not is_remote(name):
        return GGUFFile.open(model_path(name))
    with console.status(f"reading the header of {name}"):
        return GGUFFile.open(remote_file(name))
