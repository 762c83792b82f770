"""Row 4: duplicate, empty and foreign keys and tensor names."""

from pathlib import Path

import pytest

from tests.support.broken_gguf import BrokenFile, assert_refused, bad_names


@pytest.mark.parametrize("broken", [*bad_names()], ids=lambda broken: broken.name)
def test_row_04_a_bad_name_is_refused(broken: BrokenFile, tmp_path: Path) -> None:
    assert_refused(broken, tmp_path)
