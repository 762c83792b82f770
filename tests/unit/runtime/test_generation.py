"""One sequence: the pieces it yields, where it ends, what it refuses."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.errors import RequestError
from runtime.generation import Generation, check_prompt
from runtime.sampler import SamplingParams
from runtime.session import Session
from runtime.tokenizer.stream import StreamDecoder

GREEDY = SamplingParams(temperature=0)
VOCABULARY = [bytes([code]) for code in range(32, 127)] + [b"\xe2\x82", b"\xac", b"\n", b""]
END = len(VOCABULARY) - 1


class FakeKV:
    """Counts rows."""

    def __init__(self, capacity_tokens: int) -> None:
        self.capacity_tokens = capacity_tokens
        self.length = 0

    def truncate(self, length: int) -> None:
        self.length = min(self.length, length)


class FakeTokenizer:
    """One token a printable ASCII character, two halves of the euro sign, and an end."""

    vocab_size = len(VOCABULARY)
    eog_ids = frozenset({END})

    def stream(self, *, prompt_ids: Sequence[int]) -> StreamDecoder:
        return StreamDecoder(lambda token_id: VOCABULARY[token_id])


def ids_of(text: bytes) -> list[int]:
    """Tokens that spell `text`."""
    ids, rest = [], text
    while rest:
        token = next(index for index, piece in enumerate(VOCABULARY) if piece and rest.startswith(piece))
        ids.append(token)
        rest = rest[len(VOCABULARY[token]) :]
    return ids


def run(script: list[int], *, capacity: int = 1000, chunk: int = 1000, prompt: bytes = b"ab", **options) -> Generation:
    """A generation whose model says `script`."""
    kv = FakeKV(capacity)
    generation = Generation(FakeTokenizer(), Session(kv), ids_of(prompt), sampling=GREEDY, **options)
    said = iter([*script, END])
    steps = 0
    while not generation.finished:
        step = generation.next_step(chunk)
        assert 0 < len(step.token_ids) <= chunk
        kv.length += len(step.token_ids)
        steps += 1
        logits = np.zeros(len(VOCABULARY), np.float32)
        if kv.length >= len(prompt):
            logits[next(said)] = 9.0
        generation.advance(logits)
    return generation


def test_pieces_carry_one_token_each_and_join_to_the_answer():
    generation = run(ids_of(b"hello"))
    assert [piece.text for piece in generation.pieces] == ["h", "e", "l", "l", "o", ""]
    assert [piece.finish_reason for piece in generation.pieces] == [None] * 5 + ["stop"]
    completion = generation.completion()
    assert completion.text == "hello"
    assert completion.token_ids == (*ids_of(b"hello"), END)
    assert completion.prompt_tokens == 2


def test_a_character_split_over_tokens_is_held_back():
    pieces = run(ids_of("5€!".encode())).pieces
    assert [piece.text for piece in pieces] == ["5", "", "€", "!", ""]


def test_half_a_character_at_the_end_shows_as_replacement():
    assert run([*ids_of(b"a"), VOCABULARY.index(b"\xe2\x82")]).completion().text == "a\ufffd"


def test_max_tokens_ends_with_length():
    generation = run(ids_of(b"hello"), max_tokens=3)
    assert generation.completion().text == "hel"
    assert generation.finish_reason == "length"


def test_a_full_context_ends_with_length():
    generation = run(ids_of(b"hello world"), capacity=6)
    assert generation.completion().text == "hell"
    assert generation.finish_reason == "length"


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_a_prompt_is_read_in_chunks(chunk):
    generation = run(ids_of(b"x"), prompt=b"abcdefg", chunk=chunk)
    assert generation.completion().text == "x"
    assert generation.timing.prompt_tokens == 7


def test_stop_strings_never_show():
    generation = run(ids_of(b"one two END three"), stop=["END"])
    assert generation.completion().text == "one two "
    assert generation.finish_reason == "stop"


def test_text_that_only_looked_like_a_stop_string_comes_at_the_end():
    assert run(ids_of(b"one EN"), stop=["END"]).completion().text == "one EN"
    assert run(ids_of(b"one EN"), stop=["END"], max_tokens=6).completion().text == "one EN"


@given(
    st.text(st.sampled_from("ab€ "), max_size=30),
    st.lists(st.text(st.sampled_from("ab€"), min_size=1, max_size=3), max_size=3),
)
def test_the_stream_is_the_text_up_to_the_first_stop_string(text, stops):
    cuts = [text.find(stop) for stop in stops if stop in text]
    assert run(ids_of(text.encode()), stop=stops).completion().text == (text[: min(cuts)] if cuts else text)


def test_winding_up_makes_the_next_token_the_last():
    kv = FakeKV(100)
    generation = Generation(FakeTokenizer(), Session(kv), ids_of(b"ab"), sampling=GREEDY, stop=["hex"])
    for token in ids_of(b"he"):
        kv.length += len(generation.next_step(10).token_ids)
        logits = np.zeros(len(VOCABULARY), np.float32)
        logits[token] = 1
        generation.advance(logits)
        generation.wind_up()
    assert generation.finish_reason == "cancelled"
    assert generation.completion().text == "he"


def test_winding_up_before_the_first_token_ends_at_once():
    generation = Generation(FakeTokenizer(), Session(FakeKV(100)), [1, 2], sampling=GREEDY)
    generation.wind_up()
    assert generation.finish_reason == "cancelled"
    assert generation.completion().text == ""


def test_the_rows_of_a_common_beginning_are_kept():
    kv = FakeKV(100)
    session = Session(kv)
    assert session.rewind_to([1, 2, 3, 4]) == 0
    kv.length = 4
    assert session.rewind_to([1, 2, 9]) == 2
    assert kv.length == 2
    kv.length = 3
    assert session.rewind_to([1, 2, 9]) == 2, "the last token's logits are wanted"
    session.clear()
    assert kv.length == 0


@pytest.mark.parametrize(
    ("ids", "words"),
    [([], "empty"), ([1] * 10, "10 tokens"), ([1, 5, 99], "token id 99"), ([-1, 2], "token id -1")],
)
def test_prompts_that_cannot_be_read_are_refused(ids, words):
    with pytest.raises(RequestError, match=words):
        check_prompt(ids, 50, 10)


def test_timing_counts_only_what_was_computed():
    timing = run(ids_of(b"hello")).timing
    assert timing.generated_tokens == 6
    assert timing.ttft_s > 0
    assert timing.prefill_tokens_per_s == pytest.approx(2 / timing.ttft_s)
    assert timing.decode_tokens_per_s > 0
    assert run([]).timing.decode_tokens_per_s is None
