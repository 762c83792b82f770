"""The journal of a build: what whole lines say is done, what is left of a line is cut off."""

from pathlib import Path

import pytest

from offload.errors import FlashError
from offload.store_files import FILES
from offload.store_journal import BundleJournal, is_held


def opened(path: Path, identity: str = "one", bundles: int = 100) -> BundleJournal:
    return BundleJournal(path, identity, bundles, FILES)


def test_what_was_added_is_there_at_the_next_opening(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with opened(path) as journal:
        assert journal.checksums == {}
        journal.add({3: 2**64 - 1, 1: 0})
        journal.add({2: 5})
    with opened(path) as journal:
        assert journal.checksums == {3: 2**64 - 1, 1: 0, 2: 5}
        journal.close()
        journal.close()


@pytest.mark.parametrize("torn", [b"4 0000000000", b"\0" * 30, b"4 00000000000000zz\n", b"400 0000000000000000\n"])
def test_what_a_power_loss_left_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "journal"
    with opened(path) as journal:
        journal.add({3: 9})
    whole = path.read_bytes()
    path.write_bytes(whole + torn + b"5 0000000000000000\n")
    with opened(path) as journal:
        assert journal.checksums == {3: 9}
        assert path.read_bytes() == whole
        journal.add({4: 1})
    with opened(path) as journal:
        assert journal.checksums == {3: 9, 4: 1}


def test_the_journal_of_another_build_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with opened(path) as journal:
        journal.add({3: 9})
    with opened(path, "two") as journal:
        assert journal.checksums == {}
    with opened(path, "two") as journal:
        journal.add({1: 1})
        journal.restart()
    with opened(path, "two") as journal:
        assert journal.checksums == {}


def test_two_builds_at_once_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.partial" / "journal"
    path.parent.mkdir()
    assert not is_held(path)
    with opened(path):
        assert is_held(path)
        with pytest.raises(FlashError, match=r"store.partial: another process is building this store"):
            opened(path)
    assert not is_held(path)
    opened(path).close()
