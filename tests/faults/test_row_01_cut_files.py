"""Row 1: a GGUF file cut at any byte of its header or data, or one that is something else altogether."""

import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from offload.errors import ModelFormatError
from offload.gguf import GGUFFile
from tests.support.broken_gguf import (
    BrokenFile,
    assert_refused,
    bad_alignments,
    bad_names,
    bad_regions,
    costly_files,
    cut_files,
    huge_counts,
    overflowing_tensors,
    strange_starts,
)
from tests.support.gguf_bytes import small_model

REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT_BYTES = 200 << 20
MEASURE = """
import sys, time
from offload.errors import ModelFormatError
from offload.gguf import GGUFFile
from tests.support.peak_memory import peak_bytes
start = time.process_time()
try:
    GGUFFile.open(sys.argv[1])
except ModelFormatError as error:
    print(time.process_time() - start, peak_bytes(), error)
"""


@pytest.mark.parametrize("version", [2, 3])
def test_row_01_a_file_cut_at_any_byte_is_refused(version: int, tmp_path: Path) -> None:
    for broken in cut_files(version):
        assert_refused(broken, tmp_path)


def test_row_01_the_whole_file_opens(tmp_path: Path) -> None:
    path = tmp_path / "whole.gguf"
    path.write_bytes(small_model().build())
    with GGUFFile.open(path) as gguf:
        assert len(gguf.tensors) == 3


def test_row_01_a_cut_in_the_data_names_tensor_and_offset(tmp_path: Path) -> None:
    whole = small_model().build()
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[:-1])
    with pytest.raises(ModelFormatError, match=rf"'output.weight' .* ends at byte {len(whole) - 1}"):
        GGUFFile.open(path)


@pytest.mark.parametrize("broken", [*strange_starts()], ids=lambda broken: broken.name)
def test_row_01_what_is_not_gguf_is_named(broken: BrokenFile, tmp_path: Path) -> None:
    assert_refused(broken, tmp_path)


def test_row_01_no_broken_file_of_the_corpus_takes_memory(tmp_path: Path) -> None:
    for rows in (strange_starts, huge_counts, overflowing_tensors, bad_names, bad_alignments, bad_regions):
        for broken in rows():
            path = broken.write(tmp_path)
            tracemalloc.start()
            try:
                with pytest.raises(ModelFormatError):
                    GGUFFile.open(path)
                assert tracemalloc.get_traced_memory()[1] < 16 << 20, broken.name
            finally:
                tracemalloc.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_row_01_a_fault_behind_a_costly_header_stays_within_time_and_memory(tmp_path: Path) -> None:
    for broken in costly_files():
        command = [sys.executable, "-c", MEASURE, str(broken.write(tmp_path))]
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
        elapsed_s, peak, message = result.stdout.split(maxsplit=2)
        assert float(elapsed_s) < 1, broken.name
        assert int(peak) < LIMIT_BYTES, broken.name
        for mention in broken.mentions:
            assert mention in message
