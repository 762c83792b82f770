import os
import time
from pathlib import Path

import pytest

from offload import kv_session_folder
from offload.errors import FlashError
from offload.kv_session_folder import BlockFolder
from offload.store_files import Files
from tests.support.kv_blocks import DIGESTS, SIZE, Rows, filled, read, rows_of

FILE = SIZE.file_bytes


def test_blocks_are_found_again_in_a_folder_that_others_cannot_look_into(tmp_path: Path) -> None:
    blocks = filled(tmp_path / "a" / "b")
    assert read(blocks) == ([0, 1, 2, 3], None)
    assert blocks.folder.stat().st_mode & 0o777 == 0o700
    assert [held.num_bytes for held in blocks.held()] == [FILE] * 4


def test_a_folder_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    blocks = BlockFolder(tmp_path / "none")
    assert blocks.held() == []
    assert not blocks.has(DIGESTS[0])
    blocks.drop(DIGESTS[0])
    blocks.touch(DIGESTS)
    blocks.keep_only(())
    assert blocks.write([], SIZE, lambda _index, _out: None) == 0
    assert not blocks.folder.exists()


def test_other_blocks_and_unfinished_ones_are_removed(tmp_path: Path) -> None:
    blocks = filled(tmp_path)
    (tmp_path / "00.kv.77.partial").write_bytes(b"half")
    (tmp_path / "session.json").write_bytes(b"{}")
    blocks.keep_only(DIGESTS[:2])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["session.json", *(blocks.path(digest).name for digest in DIGESTS[:2])]
    )


def test_the_blocks_used_longest_ago_give_way(tmp_path: Path) -> None:
    filled(tmp_path)
    blocks = BlockFolder(tmp_path, most_bytes=4 * FILE)
    for age, digest in enumerate(DIGESTS):
        os.utime(blocks.path(digest), (1000 + age, 1000 + age))
    blocks.touch(DIGESTS[:1])
    new = [b"n" * 16, b"m" * 16]
    assert blocks.write(new, SIZE, fill) == 2
    assert [blocks.has(digest) for digest in [*DIGESTS, *new]] == [True, False, False, True, True, True]


def test_of_blocks_in_use_the_last_give_way_first(tmp_path: Path) -> None:
    filled(tmp_path)
    blocks = BlockFolder(tmp_path, most_bytes=4 * FILE)
    blocks.touch(DIGESTS)
    blocks.write([b"n" * 16], SIZE, fill)
    assert [blocks.has(digest) for digest in DIGESTS] == [True, True, True, False]


def test_no_more_than_the_limit_is_written(tmp_path: Path) -> None:
    blocks = filled(tmp_path, most_bytes=3 * FILE - 1)
    assert [blocks.has(digest) for digest in DIGESTS] == [True, True, False, False]
    assert sum(held.num_bytes for held in blocks.held()) <= 3 * FILE - 1


def test_a_limit_of_nothing_empties_the_folder(tmp_path: Path) -> None:
    filled(tmp_path)
    blocks = BlockFolder(tmp_path, most_bytes=0)
    assert blocks.write([b"n" * 16], SIZE, fill) == 0
    assert blocks.held() == []


def test_what_a_killed_process_left_goes_when_it_is_old(tmp_path: Path) -> None:
    blocks = filled(tmp_path, most_bytes=100 * FILE)
    old, new = tmp_path / "00.kv.77.partial", tmp_path / "01.kv.78.partial"
    for path in (old, new):
        path.write_bytes(b"half")
    hours_ago = time.time() - 2 * kv_session_folder.STALE_S
    os.utime(old, (hours_ago, hours_ago))
    blocks.write([b"n" * 16], SIZE, fill)
    assert not old.exists()
    assert new.exists()


def test_a_drive_with_little_space_gets_the_first_blocks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class SmallDrive(Files):
        def free_bytes(self, folder: Path) -> int:
            return kv_session_folder.FREE_BYTES + 2 * FILE

    blocks = filled(tmp_path, SmallDrive())
    assert [blocks.has(digest) for digest in DIGESTS] == [True, True, False, False]
    assert "need room on this drive" in caplog.text


def test_a_folder_that_cannot_be_made_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FlashError, match="KV cannot be written") as caught:
        filled(tmp_path / "file" / "blocks")
    assert caught.value.hint


def fill(index: int, out: Rows) -> None:
    out[:] = rows_of(index)
