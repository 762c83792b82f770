"""`strata tokenize`: text on stdin to a JSON list of token ids on stdout."""

import json
from pathlib import Path
from typing import Annotated

import typer

from runtime.cli import options
from runtime.cli.console import write_text
from runtime.cli.headers import open_header
from runtime.tokenizer import Tokenizer


def command(
    model: options.Model,
    file: Annotated[Path, typer.Option("-f", "--file", help="Text to read; `-` is stdin.")] = Path("-"),
    special: Annotated[bool, typer.Option("--special/--no-special", help="Add BOS and EOS as the model wants.")] = True,
    parse_special: Annotated[
        bool, typer.Option("--parse-special", help="Take control tokens written in the text as tokens.")
    ] = False,
) -> None:
    """Print the token ids of a text as a JSON list."""
    text = options.read_text_file(file)
    with open_header(model) as gguf:
        tokenizer = Tokenizer.from_gguf(gguf)
    write_text(json.dumps(tokenizer.encode(text, add_special=special, parse_special=parse_special)) + "\n")
