"""Stop strings: whatever the pieces, the output is the whole text cut at the earliest start of a stop string."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import RequestError
from runtime.stop_strings import MAX_STOPS, StopStrings

FEW_LETTERS = st.text(alphabet="ab€", max_size=24)
STOPS = st.lists(st.text(alphabet="ab€", min_size=1, max_size=5), max_size=4)


def cut(text: str, stops: list[str]) -> str:
    """The whole text cut where the first stop string begins."""
    return text[: min((start for stop in stops if (start := text.find(stop)) >= 0), default=len(text))]


@settings(max_examples=500, deadline=None)
@given(pieces=st.lists(FEW_LETTERS, max_size=8), stops=STOPS)
def test_stream_equals_the_whole_text_cut(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    expected = cut(text, stops)
    stream = StopStrings(stops)
    emitted = ""
    for piece in pieces:
        shown, stopped = stream.push(piece)
        emitted += shown
        assert expected.startswith(emitted)
        assert stopped == stream.stopped
        if stopped:
            assert emitted == expected
    emitted += stream.flush()
    assert emitted == expected
    assert stream.stopped == any(stop in text for stop in stops)
    if stream.matched is not None:
        assert text[len(expected) :].startswith(stream.matched)


@settings(max_examples=200, deadline=None)
@given(text=FEW_LETTERS, stops=STOPS)
def test_no_more_is_held_back_than_may_become_a_stop_string(text: str, stops: list[str]) -> None:
    stream = StopStrings(stops)
    emitted = "".join(stream.push(character)[0] for character in text)
    if not stream.stopped:
        held = text[len(emitted) :]
        assert not held or any(stop.startswith(held) or held.find(stop) > 0 for stop in stops)


def test_a_stop_string_split_over_pieces() -> None:
    stream = StopStrings(["</s>"])
    assert [stream.push(piece) for piece in ("Hi <", "/", "b> <", "/s", "> more")] == [
        ("Hi ", False),
        ("", False),
        ("</b> ", False),
        ("", False),
        ("", True),
    ]
    assert stream.matched == "</s>"
    assert stream.push("after") == ("", True)
    assert stream.flush() == ""


def test_an_earlier_start_wins_over_an_earlier_end() -> None:
    stops = ["abcd", "bc"]
    stream = StopStrings(stops)
    assert stream.push("xabc") == ("x", False)  # "bc" is complete, but "abcd" may still begin before it
    assert stream.push("d") == ("", True)
    assert stream.matched == "abcd"
    other = StopStrings(stops)
    other.push("xabc")
    assert other.push("!") == ("a", True)
    assert other.matched == "bc"
    at_the_end = StopStrings(stops)
    at_the_end.push("xabc")
    assert (at_the_end.flush(), at_the_end.stopped) == ("a", True)


def test_of_two_that_begin_together_the_shorter_is_matched() -> None:
    stream = StopStrings(["stop!", "stop"])
    assert stream.push("now stop!") == ("now ", True)
    assert stream.matched == "stop"


def test_without_stops_everything_passes() -> None:
    stream = StopStrings()
    assert stream.push("anything") == ("anything", False)
    assert stream.flush() == ""
    assert not stream.stopped


@pytest.mark.parametrize("stops", [[""], ["x" * 257], ["x"] * (MAX_STOPS + 1), "abc", [1], None])
def test_bad_stops_are_refused(stops: object) -> None:
    with pytest.raises(RequestError, match="stop string"):
        StopStrings(stops)  # type: ignore[arg-type]
