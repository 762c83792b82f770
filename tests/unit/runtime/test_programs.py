"""Programs that were made: few are kept, of those for plans as many as have few rows together."""

import pytest

from cpu_kernels.program import Program, Row
from runtime.executor.program import programs
from runtime.executor.program.programs import Programs


def of_rows(count: int) -> Program:
    return Program(Row("nothing", 0, 0) for _ in range(count))


def test_programs_are_made_once_while_they_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "MAX_PROGRAMS", 2)
    monkeypatch.setattr(programs, "MAX_PLANNED_ROWS", 10)
    kept, made = Programs(), []

    def get(key: str, plan: str | None, rows: int = 1) -> int:
        def new() -> Program:
            made.append((key, plan))
            return of_rows(rows)

        return len(kept.get(key, plan, new).program)

    for key in "aba":
        get(key, None)
    get("c", None)  # in place of b, which was used before a
    assert made == [("a", None), ("b", None), ("c", None)]
    for plan, rows in (("p", 4), ("q", 5), ("p", 4), ("r", 5)):
        assert get("a", plan, rows) == rows
    assert made[3:] == [("a", "p"), ("a", "q"), ("a", "r")]
    get("a", "p")
    get("a", "q", 30)  # too many rows even alone
    assert made[6:] == [("a", "q")]
    get("a", "q")
    get("a", None)
    assert made[7:] == []
    assert len(kept) == 3
    kept.clear()
    assert len(kept) == 0
    get("a", "q")
    get("a", None)
    assert made[7:] == [("a", "q"), ("a", None)]
