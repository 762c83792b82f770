"""Row 17: the budget comes from the control group's limit where there is one, not from the machine's memory."""

from pathlib import Path

import pytest

from offload.errors import DoesNotFitError
from planner.budget import GIB, MIB, measure_budget
from planner.solve import make_plan
from tests.support.planning import llama_8b, profile


@pytest.fixture
def confined(tmp_path: Path) -> Path:
    """A machine whose control group leaves 1 GiB."""
    group = tmp_path / "sys/fs/cgroup/box"
    group.mkdir(parents=True)
    (group / "memory.max").write_text(f"{GIB + 64 * MIB}\n")
    (group / "memory.current").write_text(f"{64 * MIB}\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/box\n")
    return tmp_path


def test_limit_of_the_control_group_bounds_the_budget(confined: Path) -> None:
    budget = measure_budget(root=confined)
    assert GIB <= budget.ram_bytes < 2 * GIB  # this process's own bytes come on top of what is left
    assert "control group" in budget.ram_source
    assert budget.ram_margin_bytes >= 50 * MIB


def test_a_model_beyond_the_limit_is_refused_before_loading(confined: Path) -> None:
    with pytest.raises(DoesNotFitError, match="control group limit of 1") as caught:
        make_plan(llama_8b("F16"), budget=measure_budget(root=confined), profile=profile())
    assert caught.value.needed_bytes > caught.value.available_bytes
