"""Row 29: kill -9 in the middle of a batch, resume: the answers of an uninterrupted run, none lost, none twice."""

import json
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from runtime.batch import run_batch
from tests.conftest import REPOSITORY
from tests.support.batch_engine import FakeEngine

LINES = 60


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Prompts of both styles, some of them malformed."""
    path = tmp_path / "in.jsonl"
    with path.open("w") as file:
        for i in range(LINES):
            if i % 10 == 3:
                file.write("{broken\n")
            elif i % 2:
                message = {"role": "user", "content": f"question {i}"}
                file.write(json.dumps({"custom_id": f"c{i}", "body": {"messages": [message]}}) + "\n")
            else:
                file.write(json.dumps({"id": i, "prompt": f"prompt {i}"}) + "\n")
    return path


def start(source: Path, output: Path, delay_s: float, parallel: int = 4) -> subprocess.Popen[str]:
    """A batch in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "tests.support.batch_worker",
        str(source),
        str(output),
        str(delay_s),
        str(parallel),
    ]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=pipe, stderr=pipe, text=True)


def answers(path: Path) -> list[dict[str, Any]]:
    """The records in the order of their digests, without the time of day."""
    records = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    for record in records:
        if record.get("response"):
            del record["response"]["body"]["created"]
    return sorted(records, key=lambda record: str(record["request_sha256"]))


def uninterrupted(source: Path, folder: Path) -> list[dict[str, Any]]:
    run_batch(FakeEngine(), source, folder / "whole.jsonl")
    return answers(folder / "whole.jsonl")


def wait_for_records(output: Path, count: int) -> None:
    """Wait until the output holds at least `count` lines."""
    deadline = time.monotonic() + 30
    while not output.exists() or output.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline, "the batch makes no progress"
        time.sleep(0.002)


def test_killed_again_and_again(source: Path, tmp_path: Path) -> None:
    expected = uninterrupted(source, tmp_path)
    output = tmp_path / "out.jsonl"
    generator = random.Random(29)
    done = 0
    for _ in range(4):
        process = start(source, output, 0.01)
        wait_for_records(output, done + generator.randint(2, 10))
        time.sleep(generator.random() * 0.02)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.communicate()
        content = output.read_bytes()
        done = content.count(b"\n")
        assert done < LINES
        if generator.random() < 0.7:  # a kill rarely falls between the parts of a write: cut one here
            torn = content[: content.rindex(b"\n", 0, -1) + 1 + generator.randint(1, 60)]
            output.write_bytes(torn)
            done = torn.count(b"\n")
    last = start(source, output, 0.0)
    message, errors = last.communicate(timeout=60)
    assert last.returncode == 0, errors
    assert f"{done} done before, of {LINES}" in message
    assert answers(output) == expected


def test_an_interrupt_stops_at_a_record_and_tells_how_to_go_on(source: Path, tmp_path: Path) -> None:
    expected = uninterrupted(source, tmp_path)
    output = tmp_path / "out.jsonl"
    process = start(source, output, 0.02)
    wait_for_records(output, 5)
    process.send_signal(signal.SIGINT)
    message, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")
    assert "interrupted" in message and "the same command goes on" in message
    assert output.read_bytes().endswith(b"\n")
    run_batch(FakeEngine(), source, output)
    assert answers(output) == expected


def test_a_second_process_on_one_output_is_refused(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    first = start(source, output, 0.05)
    wait_for_records(output, 1)
    second = start(source, output, 0.0)
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 1
    assert "RequestError" in errors and "is being written by another process" in errors
    first.kill()
    first.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="limits another process's file size, which Linux alone allows")
def test_a_full_disk_stops_the_run_with_nothing_torn(source: Path, tmp_path: Path) -> None:
    expected = uninterrupted(source, tmp_path)
    output = tmp_path / "out.jsonl"
    process = start(source, output, 0.02)
    wait_for_records(output, 3)
    room = output.stat().st_size + 2000
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (room, room))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.startswith("FlashError: cannot write to")
    assert output.stat().st_size <= room
    assert output.read_bytes().endswith(b"\n")
    run_batch(FakeEngine(), source, output)
    assert answers(output) == expected
