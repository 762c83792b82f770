"""Saved sessions of a tiny model, and the same asked without them."""

from collections.abc import Sequence
from pathlib import Path

from offload.store_files import FILES, Files
from runtime.engine import Engine
from runtime.generation import Piece
from runtime.sampler import SamplingParams
from runtime.session_saved import SavedSession
from tests.support.models import prompt

GREEDY = SamplingParams(temperature=0.0)
FIRST = prompt(seed=1, length=150)
NEXT = prompt(seed=2, length=20)[1:]
NAME = "kept"


def answer(engine: Engine, ids: Sequence[int], saved: SavedSession | None = None) -> tuple[list[Piece], int]:
    """Eight greedy tokens behind `ids`, and how many of the prompt's tokens were computed; KV goes to `saved`."""
    session = engine.session()
    if saved is not None:
        saved.use(engine.rows_keys(), session.kv)
        session.rows = saved
    pieces = list(engine.generate(ids, max_tokens=8, sampling=GREEDY, session=session))
    if saved is not None:
        saved.save([{"role": "user", "content": str(len(ids))}], session)
    assert engine.measured is not None
    return pieces, engine.measured.prompt_tokens or 0


def tokens(pieces: Sequence[Piece]) -> list[tuple[int, float]]:
    """What was drawn, with the bits of its probability."""
    return [(piece.token_id, piece.logprob) for piece in pieces]


def first_turn(engine: Engine, root: Path, files: Files = FILES) -> list[int]:
    """Saves a session of one turn; the prompt of the next turn, which begins with it."""
    with SavedSession(NAME, root, files=files) as saved:
        pieces, _ = answer(engine, FIRST, saved)
    return [*FIRST, *(piece.token_id for piece in pieces), *NEXT]
