"""Chat templates of several families, the variables they get, and the helper process seen from both ends."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from offload.errors import RequestError
from offload.gguf import GGUFFile
from runtime import chat_template_worker as worker
from runtime.chat_template import ChatTemplate
from runtime.tokenizer import Tokenizer
from tests.support.tokenizer_files import KeyValue, write_byte_level

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": " Hi "}
ASSISTANT = {"role": "assistant", "content": "Hello"}
TALK = [SYSTEM, USER, ASSISTANT, USER]

CHATML = """\
{% for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
LLAMA3 = """\
{%- set loop_messages = messages %}
{%- for message in loop_messages %}
    {%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim %}
    {%- if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}
    {{- content + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
MISTRAL = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}{% set rest = messages[1:] %}
{%- else %}
    {%- set system = '' %}{% set rest = messages %}
{%- endif %}
{%- for message in rest %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + (system + '\\n\\n' if loop.first and system else '') + message['content'] + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}"""
GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{% endif %}"""
PHI3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + '\\n' + message['content']"
    " + '<|end|>\\n' }}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def template() -> Iterator[ChatTemplate]:
    """One helper process for all; `source` is changed as wanted."""
    with ChatTemplate("", bos_token="<s>", eos_token="</s>") as template:
        yield template


def rendered(template: ChatTemplate, source: str, messages: list[dict[str, str]], **options: Any) -> str:
    """The text of one template."""
    template.source = source
    return template.render(messages, **options)


def test_chatml(template: ChatTemplate) -> None:
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Hi <|im_end|>\n"
    assert rendered(template, CHATML, TALK[:2], add_generation_prompt=False) == expected
    assert rendered(template, CHATML, TALK[:2]) == expected + "<|im_start|>assistant\n"


def test_llama3(template: ChatTemplate) -> None:
    header = "<|start_header_id|>{}<|end_header_id|>\n\n{}"
    turns = "".join(header.format(turn["role"], turn["content"].strip()) + "<|eot_id|>" for turn in TALK)
    assert rendered(template, LLAMA3, TALK) == "<s>" + turns + header.format("assistant", "")


def test_mistral(template: ChatTemplate) -> None:
    assert rendered(template, MISTRAL, TALK) == "<s>[INST] Be brief.\n\n Hi  [/INST] Hello</s>[INST]  Hi  [/INST]"
    with pytest.raises(RequestError, match="refuses these messages: roles must alternate"):
        rendered(template, MISTRAL, [USER, USER])


def test_gemma(template: ChatTemplate) -> None:
    turns = "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
    assert rendered(template, GEMMA, [USER, ASSISTANT], add_generation_prompt=False) == turns
    with pytest.raises(RequestError, match="System role not supported") as error:
        rendered(template, GEMMA, TALK)
    assert error.value.hint is not None
    assert "--chat-template-file" in error.value.hint


def test_phi3(template: ChatTemplate) -> None:
    assert rendered(template, PHI3, [USER]) == "<s><|user|>\n Hi <|end|>\n<|assistant|>\n"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ tools is none }} {{ add_generation_prompt }}", "True True"),
        ("{{ tools is defined and documents is not defined }}", "True"),
        ("{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}", "<é>"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "<é>"}, {"role": "user", "content": "2"}]'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=2) }}", '{\n  "b": 1,\n  "a": 2\n}'),
        ("{{ (strftime_now('%Y') | int) > 2000 }}", "True"),
        ("a{% generation %}b{% endgeneration %}c", "abc"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{{ messages[0].content.strip('<>').upper() }}", "É"),
        ("{{ flag }}{{ bos_token }}", "on<s>"),
        ("", ""),
    ],
)
def test_what_templates_may_use(template: ChatTemplate, source: str, expected: str) -> None:
    messages = [{"role": "user", "content": "<é>"}, {"role": "user", "content": "2"}]
    assert rendered(template, source, messages, variables={"flag": "on"}) == expected


def test_tools(template: ChatTemplate) -> None:
    assert rendered(template, "{{ tools[0].name }}", [USER], tools=[{"name": "search"}]) == "search"


def test_any_text_survives(template: ChatTemplate) -> None:
    text = "\0\x7f\u2028 🦙 \ud800 {{ 9 }} {% if %}"
    assert rendered(template, "{{ messages[0].content }}", [{"role": "user", "content": text}]) == text
    assert len(rendered(template, "{{ messages[0].content }}", [{"role": "user", "content": "é" * 2_000_000}])) == 2e6


def test_messages_that_are_no_json(template: ChatTemplate) -> None:
    with pytest.raises(RequestError, match="JSON"):
        template.render([{"role": "user", "content": object()}])


def test_closing_twice_and_going_on() -> None:
    template = ChatTemplate("{{ eos_token }}", eos_token="x")
    template.close()
    assert template.render([]) == "x"
    template.close()
    template.close()
    assert template.render([]) == "x"
    template.close()


def of_file(path: Path, name: str | None = None, **keys: KeyValue) -> str | None:
    """What the template of a file with these keys renders."""
    write_byte_level(path, **keys)
    with GGUFFile.open(path) as gguf:
        template = ChatTemplate.from_gguf(gguf, Tokenizer.from_gguf(gguf), name)
        if template is None:
            return None
        with template:
            return template.render([USER])


def test_the_files_template(tmp_path: Path) -> None:
    assert of_file(tmp_path / "a.gguf") is None
    assert of_file(tmp_path / "b.gguf", chat_template="{{ bos_token }}!") == "<|endoftext|>!"
    variants: dict[str, KeyValue] = {"chat_template": "default", "chat_template.tool_use": "tools"}
    assert of_file(tmp_path / "c.gguf", **variants) == "default"
    assert of_file(tmp_path / "d.gguf", "tool_use", **variants) == "tools"
    with pytest.raises(RequestError, match="no chat template 'other'") as error:
        of_file(tmp_path / "e.gguf", "other", **variants)
    assert error.value.hint is not None
    assert "tool_use" in error.value.hint


@pytest.mark.parametrize("name", ["qwen2", "phi-3"])
def test_published_templates(shared_data: Path, name: str) -> None:
    with GGUFFile.open(shared_data / "tokenizer_cases" / f"ggml-vocab-{name}.gguf") as gguf:
        template = ChatTemplate.from_gguf(gguf, Tokenizer.from_gguf(gguf))
        assert template is not None
        with template:
            text = template.render([USER])
    expected = {
        "qwen2": "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
        "<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n",
        "phi-3": "<s><|user|>\n Hi <|end|>\n<|assistant|>\n",
    }
    assert text == expected[name]


def test_a_process_that_cannot_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "no-python"))
    with pytest.raises(RequestError, match="does not start"):
        ChatTemplate("x").render([])


def test_a_process_that_ends_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("runtime.chat_template.WORKER", tmp_path / "missing.py")
    with pytest.raises(RequestError, match="does not start: its process ended with code 1"):
        ChatTemplate("x").render([])


def test_a_platform_without_limits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = worker.__file__
    assert source is not None
    altered = (
        Path(source)
        .read_text(encoding="utf-8")
        .replace('find_spec("resource") is not None', 'find_spec("nope") is not None')
    )
    (tmp_path / "worker.py").write_text(altered, encoding="utf-8")
    monkeypatch.setattr("runtime.chat_template.WORKER", tmp_path / "worker.py")
    with ChatTemplate("{{ 1 }}", timeout_s=0.5) as template:
        assert template.render([]) == "1"
        assert "cannot limit" in caplog.text
        template.source = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
        with pytest.raises(RequestError, match=r"more than 0\.5 s"):
            template.render([])


def request(source: str, **variables: Any) -> dict[str, Any]:
    """As the helper process gets it."""
    return {"source": source, "variables": variables, "output_characters": 100, "cpu_s": 1000}


@pytest.mark.parametrize(
    ("source", "kind", "error"),
    [
        ("{% if", "syntax", "line 1"),
        ("{{ raise_exception('no') }}", "refused", "no"),
        ("{{ ''.__class__ .x }}", "security", "__class__"),
        ("{{ fail() }}", "memory", ""),
        ("{{ 'x' * 101 }}", "output", ""),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "failed", "itself"),
        ("{{ a.b }}", "failed", "UndefinedError"),
    ],
)
def test_answers_of_the_worker(source: str, kind: str, error: str) -> None:
    def fail() -> None:
        raise MemoryError

    answer = worker.answer(worker.make_environment(), request(source, fail=fail))
    assert answer["kind"] == kind
    assert error in answer["error"]


def test_long_error_messages_are_cut() -> None:
    answer = worker.answer(worker.make_environment(), request("{{ raise_exception('x' * 10000) }}"))
    assert len(answer["error"]) == worker.MESSAGE_CHARACTERS


def test_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "HAS_LIMITS", False)  # they would bind the tests too
    requests, answers = io.BytesIO(), io.BytesIO()
    for source in ("{{ 1 + 1 }}", "{{ x }}"):
        worker.write_frame(requests, request(source, x="é\ud800"))
    requests.seek(0)
    worker.serve(requests, answers, 1 << 30)
    answers.seek(0)
    frames = [worker.read_frame(answers) for _ in range(4)]
    assert frames == [{"limited": False}, {"text": "2"}, {"text": "é\ud800"}, None]


def test_json_of_the_filter() -> None:
    assert worker.to_json({"é": "<&>"}) == '{"é": "<&>"}'
    assert worker.to_json([1], ensure_ascii=True, separators=(",", ":")) == json.dumps([1])
