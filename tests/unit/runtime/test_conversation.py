"""A conversation: what is kept between turns, and what goes when the context is full (row 26)."""

import json

import pytest

from offload.errors import RequestError
from runtime.conversation import Conversation
from runtime.sampler import SamplingParams

GREEDY = SamplingParams(temperature=0)


@pytest.fixture
def conversation(demo_engine):
    made = Conversation(demo_engine, system="You tell stories.")
    yield made
    demo_engine.text.close()
    demo_engine.text.chat_template = None


def say(conversation, engine, text, reserve=16):
    turn = conversation.ask(text, reserve_tokens=reserve)
    pieces = list(engine.generate(turn.token_ids, max_tokens=8, sampling=GREEDY, session=conversation.session))
    conversation.answer("".join(piece.text for piece in pieces))
    return turn


def test_a_file_without_template_gets_plain_dialogue(conversation, demo_engine):
    assert not conversation.has_own_template
    turn = conversation.ask("Hello", reserve_tokens=10)
    assert demo_engine.tokenizer.decode(turn.token_ids) == "System: You tell stories.\nUser: Hello\nAssistant:"


def test_a_second_turn_reuses_the_first(conversation, demo_engine):
    say(conversation, demo_engine, "Hello")
    first = demo_engine.measured.prompt_tokens
    turn = say(conversation, demo_engine, "Go on")
    assert demo_engine.measured.prompt_tokens < len(turn.token_ids) - first // 2
    assert [message["role"] for message in conversation.messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]


def test_row_26_the_oldest_turns_go_and_the_system_message_stays(conversation, demo_engine):
    dropped = []
    for number in range(12):
        turn = say(conversation, demo_engine, f"Tell me number {number} " + "and again " * 30, reserve=64)
        assert len(turn.token_ids) + 64 <= demo_engine.context_tokens
        dropped += turn.dropped
    assert dropped
    assert dropped[0]["content"].startswith("Tell me number 0")
    assert len(dropped) % 2 == 0, "an answer goes with its question"
    assert conversation.messages[0]["role"] == "system"
    assert conversation.messages[1]["role"] == "user"


def test_row_26_a_message_too_long_alone_is_refused_and_nothing_is_lost(conversation, demo_engine):
    say(conversation, demo_engine, "Hello")
    before = list(conversation.messages)
    with pytest.raises(RequestError, match=rf"the context holds {demo_engine.context_tokens}"):
        conversation.ask("word " * 2000, reserve_tokens=16)
    assert conversation.messages == before


def test_clear_keeps_the_system_message(conversation, demo_engine):
    say(conversation, demo_engine, "Hello")
    conversation.clear()
    assert [message["role"] for message in conversation.messages] == ["system"]
    assert conversation.session.kv.length == 0
    say(conversation, demo_engine, "Hello again")


def test_save_writes_the_messages(conversation, demo_engine, tmp_path):
    say(conversation, demo_engine, "Hello")
    conversation.save(tmp_path / "talk.json")
    assert json.loads((tmp_path / "talk.json").read_text()) == conversation.messages
    with pytest.raises(RequestError, match="cannot write"):
        conversation.save(tmp_path / "no" / "talk.json")
