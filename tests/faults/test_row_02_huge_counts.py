"""Row 2: counts and lengths of 2^31 to 2^64-1, nested arrays; refused against the bytes that remain."""

from pathlib import Path

import pytest

from tests.support.broken_gguf import BrokenFile, assert_refused, huge_counts


@pytest.mark.parametrize("broken", [*huge_counts()], ids=lambda broken: broken.name)
def test_row_02_a_count_the_file_cannot_hold_is_refused(broken: BrokenFile, tmp_path: Path) -> None:
    assert_refused(broken, tmp_path)
