"""Row 25: a hostile chat template gets an error in bounded time and memory, and the next rendering works."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from offload.errors import RequestError
from runtime.chat_template import ChatTemplate

LIMIT_S = 6.0
LONG_LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"

HOSTILE = {
    "power": ("{{ 9 ** (9 ** 8) }}", "stopped"),
    "long string": ("{{ 'x' * 10 ** 9 }}", "512 MiB"),
    "long list": ("{{ ['x'] * 10 ** 9 }}", "512 MiB"),
    "padding": ("{{ '%1000000000d' % 1 }}", "512 MiB"),
    "format": ("{{ '{:1000000000}'.format(1) }}", "512 MiB"),
    "range": ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
    "loops": (LONG_LOOP, "stopped"),
    "output": ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "16 Mi characters"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself"),
    "nesting": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested"),
    "classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "may not do"),
    "globals": ("{{ cycler.__init__.__globals__.os.system('true') }}", "may not do"),
    "format string": ("{{ '{0.__class__.__mro__}'.format('') }}", "may not do"),
    "generator": ("{{ (messages | map('upper')).gi_frame.f_globals }}", "may not do"),
    "changing the messages": ("{{ messages.append(1) }}", "may not do"),
    "include": ("{% include '/etc/passwd' %}", "fails"),
    "syntax": ("{% for %}", "not valid Jinja"),
}


@pytest.fixture(scope="module")
def template() -> Iterator[ChatTemplate]:
    """One for all, as in a server."""
    with ChatTemplate("") as template:
        yield template


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_templates(template: ChatTemplate, case: str) -> None:
    source, message = HOSTILE[case]
    template.source = source
    started = time.monotonic()
    with pytest.raises(RequestError, match=message) as error:
        template.render([{"role": "user", "content": "x"}])
    assert time.monotonic() - started < LIMIT_S
    assert error.value.hint is not None
    assert "--raw" in error.value.hint
    template.source = "{{ messages[0].content }}"
    assert template.render([{"role": "user", "content": "fine"}]) == "fine"


def test_escapes_that_give_nothing(template: ChatTemplate) -> None:
    template.source = "{{ ''|attr('__class__') }}{{ self.__init__ }}{{ lipsum|attr('__globals__') }}"
    try:
        assert "class" not in template.render([])
    except RequestError as error:
        assert "may not do" in str(error)


def test_the_process_is_gone_after_a_timeout() -> None:
    with ChatTemplate(LONG_LOOP, timeout_s=0.3) as template:
        before = {child.pid for child in psutil.Process().children()}
        with pytest.raises(RequestError, match=r"more than 0\.3 s"):
            template.render([])
        assert {child.pid for child in psutil.Process().children()} <= before


def test_a_process_killed_from_outside_is_replaced() -> None:
    before = {child.pid for child in psutil.Process().children()}
    with ChatTemplate("{{ 1 }}") as template:
        assert template.render([]) == "1"
        (helper,) = (child for child in psutil.Process().children() if child.pid not in before)
        helper.terminate()
        helper.wait()
        with pytest.raises(RequestError, match="stopped"):
            template.render([])
        assert template.render([]) == "1"


def test_the_process_sees_nothing_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    before = {child.pid for child in psutil.Process().children()}
    with ChatTemplate("{{ 1 }}") as template, Path(__file__).open("rb"):
        template.render([])
        (helper,) = (child for child in psutil.Process().children() if child.pid not in before)
        assert "SECRET" not in helper.environ()
        assert not any(file.path == __file__ for file in helper.open_files())


def test_threads_share_one(template: ChatTemplate) -> None:
    template.source = "{{ messages[0].content }}"
    found: dict[int, str] = {}

    def render(index: int) -> None:
        found[index] = template.render([{"content": str(index) * 1000}])

    threads = [threading.Thread(target=render, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {index: str(index) * 1000 for index in range(8)}
