"""Files side by side: the fastest first, what does not fit last."""

from pathlib import Path

from planner.budget import GIB, Budget
from planner.compare import ranked
from planner.question import Here, Question, Wish, ask
from tests.support.planning import llama_8b, profile


def question(kind: str, loop: str = "auto") -> Question:
    model = llama_8b(kind)
    model.path = Path(f"{kind}.gguf")
    return ask(model, Budget(10 * GIB, 0, "test", "no GPU"), Here(profile()), Wish(loop=loop))  # type: ignore[arg-type]


def test_what_is_streamed_comes_behind_what_is_held() -> None:
    files = ranked([question(kind) for kind in ("F16", "Q8_0")])
    assert [file.path for file in files] == ["Q8_0.gguf", "F16.gguf"]
    assert files[1].plan is not None
    assert files[1].plan.settings.stream_slots > 0


def test_fastest_first_and_what_does_not_fit_last() -> None:
    questions = [question("F16", "sequential"), *(question(kind) for kind in ("Q8_0", "Q4_K", "Q2_K"))]
    files = ranked(questions)
    assert [file.path for file in files] == ["Q2_K.gguf", "Q4_K.gguf", "Q8_0.gguf", "F16.gguf"]
    assert [file.plan is None for file in files] == [False, False, False, True]
    assert "may be used (test)" in (files[-1].refusal or "")
    assert [round(file.bits_per_weight, 1) for file in files] == [2.6, 4.5, 8.5, 16.0]
