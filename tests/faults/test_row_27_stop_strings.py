"""Row 27: a stop string split over pieces never leaks, and the pieces joined equal the whole answer."""

import itertools

import pytest

from runtime.stop_strings import StopStrings

ANSWER = "Zoë says: 🙂 x END. y ENDE z"


def streamed(pieces: list[str], stops: list[str]) -> str:
    """Everything shown of `pieces`."""
    stream = StopStrings(stops)
    return "".join(stream.push(piece)[0] for piece in pieces) + stream.flush()


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (["END. y"], "Zoë says: 🙂 x "),
        (["ENDE"], "Zoë says: 🙂 x END. y "),
        (["🙂", "says"], "Zoë "),
        (["ENDING", "z!"], ANSWER),
        (["z"], ANSWER[:-1]),
    ],
)
def test_every_split_in_three_gives_the_same(stops: list[str], expected: str) -> None:
    for first, second in itertools.combinations_with_replacement(range(len(ANSWER) + 1), 2):
        pieces = [ANSWER[:first], ANSWER[first:second], ANSWER[second:]]
        assert streamed(pieces, stops) == expected


def test_one_character_at_a_time() -> None:
    assert streamed(list(ANSWER), ["ENDE z"]) == "Zoë says: 🙂 x END. y "
