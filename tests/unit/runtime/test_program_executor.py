"""The program executor's contract: bits that depend on nothing beside, caches, errors."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_kernels.program import Program
from offload.errors import ModelFormatError, RequestError, UnsupportedModelError
from runtime.executor import Step
from runtime.executor.program import ProgramExecutor, ProgramKV
from runtime.executor.program import programs as programs_module
from runtime.executor.program import runner as runner_module
from tests.support import models, programs
from tests.support.models import generated

IDS = models.prompt(length=40)
# what each of these has: chunks and lanes; experts; windows and two kinds of angles; a shared expert, biases
NAMES = ("llama", "qwen3moe", "gemma3", "qwen2moe")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def in_chunks(runner: ProgramExecutor, ids: list[int], chunks: list[int]) -> np.ndarray:
    kv = runner.new_kv(len(ids))
    parts = []
    for size in [*chunks, len(ids)]:
        step = ids[kv.length : kv.length + size]
        if step:
            parts.append(runner.forward([Step(step, kv)], logits="all")[0])
    return np.concatenate(parts)


@pytest.mark.parametrize("quant_type", ["F32", "F16", "Q8_0", "Q4_K"])
@pytest.mark.parametrize("name", NAMES)
def test_prefill_in_chunks_is_prefill_at_once_bit_for_bit(name: str, quant_type: str, folder: Path) -> None:
    with programs.executor(generated(folder, name, quant_type)) as runner:
        whole = in_chunks(runner, IDS, [])

        @settings(max_examples=4, deadline=None, derandomize=True)
        @given(chunks=st.lists(st.integers(1, 20), max_size=8))
        def check(chunks: list[int]) -> None:
            np.testing.assert_array_equal(in_chunks(runner, IDS, chunks), whole)

        check()
        np.testing.assert_array_equal(in_chunks(runner, IDS, [1] * len(IDS)), whole)


@pytest.mark.parametrize("name", NAMES)
def test_verifying_several_tokens_is_taking_them_one_by_one(name: str, folder: Path) -> None:
    with programs.executor(generated(folder, name, "Q8_0")) as runner:
        kv = runner.new_kv(64)
        runner.forward([Step(IDS[:9], kv)])
        one_by_one = [runner.forward([Step([token], kv)])[0][0] for token in IDS[9:25]]
        for count in (2, 3, 4, 5, 8, 15, 16):
            kv.truncate(9)
            several = runner.forward([Step(IDS[9 : 9 + count], kv)], logits="all")[0]
            np.testing.assert_array_equal(several, one_by_one[:count])


@pytest.mark.parametrize("name", NAMES)
def test_the_number_of_threads_changes_no_bit(name: str, folder: Path) -> None:
    path = generated(folder, name, "Q8_0")
    expected = programs.logits_of(path, IDS)
    for threads in (2, 3):
        np.testing.assert_array_equal(programs.logits_of(path, IDS, threads=threads), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_sequence_does_not_depend_on_its_batch(name: str, folder: Path) -> None:
    lengths = (5, 1, 17, 1, 40, 2, 3, 1, 9, 8, 30)
    sequences = [models.prompt(seed, length) for seed, length in enumerate(lengths)]
    with programs.executor(generated(folder, name, "Q8_0"), threads=2) as runner:
        caches = [runner.new_kv(100 if index % 3 else 300) for index in range(len(sequences))]
        together = [runner.forward([Step(ids, kv) for ids, kv in zip(sequences, caches, strict=True)], logits="all")]
        together += [runner.forward([Step([token], kv) for kv in caches]) for token in (7, 8)]
        for index, ids in enumerate(sequences):
            kv = runner.new_kv(77)
            alone = [runner.forward([Step(ids, kv)], logits="all")[0]]
            alone += [runner.forward([Step([token], kv)])[0] for token in (7, 8)]
            for got, expected in zip(together, alone, strict=True):
                np.testing.assert_array_equal(got[index], expected)


def test_prompts_longer_than_a_chunk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = generated(folder, "mixtral", "Q8_0")
    expected = programs.logits_of(path, IDS)
    monkeypatch.setattr(runner_module, "LOGITS_TOKENS", 4)
    with programs.executor(path, chunk_tokens=13) as runner:
        every = runner.forward([Step(IDS, runner.new_kv(64))], logits="all")[0]
        np.testing.assert_array_equal(every, expected)
        for count in (13, 14, 26, 40):
            kv = runner.new_kv(64)
            np.testing.assert_array_equal(runner.forward([Step(IDS[:count], kv)])[0][0], expected[count - 1])
            assert kv.length == count


def test_logits_asked_for(folder: Path) -> None:
    with programs.executor(generated(folder, "llama", "Q8_0")) as runner:
        caches = [runner.new_kv(64) for _ in range(3)]
        every = runner.forward([Step(IDS, caches[0])], logits="all")[0]
        last = runner.forward([Step(IDS, caches[1])])[0]
        none = runner.forward([Step(IDS, caches[2])], logits="none")[0]
        both = runner.forward([Step([3], kv) for kv in caches], logits="none")
        assert [kv.length for kv in caches] == [len(IDS) + 1] * 3
    assert every.shape == (len(IDS), models.VOCAB)
    assert every.dtype == last.dtype == none.dtype == np.float32
    assert none.shape == (0, models.VOCAB)
    assert [rows.shape for rows in both] == [(0, models.VOCAB)] * 3
    np.testing.assert_array_equal(last, every[-1:])


def test_logits_stay_as_they_were_given(folder: Path) -> None:
    with programs.executor(generated(folder, "llama", "Q8_0")) as runner:
        kv = runner.new_kv(64)
        first = runner.forward([Step([1], kv)])[0]
        copy = first.copy()
        runner.forward([Step([2], kv)])
        np.testing.assert_array_equal(first, copy)


def test_truncating_a_cache_takes_tokens_back(folder: Path) -> None:
    with programs.executor(generated(folder, "llama", "Q8_0")) as runner:
        kv = runner.new_kv(64)
        runner.forward([Step(IDS[:10], kv)])
        expected = runner.forward([Step([5], kv)])[0]
        runner.forward([Step([6, 7], kv)])
        kv.truncate(10)
        np.testing.assert_array_equal(runner.forward([Step([5], kv)])[0], expected)
        with pytest.raises(ValueError, match="truncating a KV cache of 11 tokens to 12"):
            kv.truncate(12)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "without tokens"),
        ([1, models.VOCAB], "token 384 is not in the vocabulary of 384"),
        ([-1], "token -1 is not"),
        ([1] * 9, "9 tokens do not fit in a context of 8"),
    ],
)
def test_bad_steps_change_nothing(ids: list[int], message: str, folder: Path) -> None:
    with programs.executor(generated(folder, "llama", "Q8_0")) as runner:
        good, bad = runner.new_kv(8), runner.new_kv(8)
        with pytest.raises(RequestError, match=message):
            runner.forward([Step([1, 2], good), Step(ids, bad)])
        assert good.length == bad.length == 0
        with pytest.raises(ValueError, match="share"):
            runner.forward([Step([1], good), Step([2], good)])
        with pytest.raises(ValueError, match="another executor"):
            runner.forward([Step([1], SimpleNamespace(length=0, capacity_tokens=8, truncate=lambda length: None))])


def test_a_failure_in_the_middle_leaves_caches_as_they_were(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with programs.executor(generated(folder, "llama", "Q8_0"), threads=2) as runner:
        caches = [runner.new_kv(64), runner.new_kv(64)]
        runner.forward([Step(IDS[:4], kv) for kv in caches])
        expected = runner.forward([Step([5, 6], kv) for kv in caches])
        for kv in caches:
            kv.truncate(4)
        pool = runner._runner._pool
        run, runs = pool.run, iter(range(100))

        def failing(program: Program) -> None:
            run(program)
            if next(runs) == 1:
                raise ModelFormatError("in the second sequence")

        monkeypatch.setattr(pool, "run", failing)
        with pytest.raises(ModelFormatError):
            runner.forward([Step([5, 6], kv) for kv in caches])
        assert [kv.length for kv in caches] == [4, 4]
        monkeypatch.setattr(pool, "run", run)
        for got, wanted in zip(runner.forward([Step([5, 6], kv) for kv in caches]), expected, strict=True):
            np.testing.assert_array_equal(got, wanted)


def test_numbers_that_become_infinite_before_a_router_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = generated(folder, "qwen3moe", "Q8_0")
    with programs.executor(path) as runner:
        kv = runner.new_kv(64)
        monkeypatch.setattr(runner._runner._weights, "embeddings", lambda ids: np.float32("inf"))
        with pytest.raises(ModelFormatError, match="'route' failed"):
            runner.forward([Step([1], kv)])
        assert kv.length == 0
        monkeypatch.undo()
        assert np.isfinite(runner.forward([Step([1], kv)])[0]).all()


def test_heads_that_the_kernels_do_not_know(tmp_path: Path) -> None:
    spec = models.Spec("llama", blocks=1, heads=64, kv_heads=1, key_length=4)
    path = models.write_model(tmp_path / "model.gguf", spec)
    with pytest.raises(UnsupportedModelError, match="64 heads share 1 KV heads"), programs.executor(path):
        pass


def test_closing_twice_and_running_after(folder: Path) -> None:
    with programs.executor(generated(folder, "llama", "Q8_0"), threads=2) as runner:
        kv = runner.new_kv(8)
        runner.forward([Step([1], kv)])
        runner.close()
        runner.close()
        with pytest.raises(ValueError, match="closed"):
            runner.forward([Step([1], kv)])
        assert kv.length == 1


def test_caches_of_many_capacities_need_few_programs(folder: Path) -> None:
    with programs.executor(generated(folder, "llama", "Q8_0")) as runner:
        for capacity in range(1, 200, 7):
            runner.forward([Step([1], runner.new_kv(capacity))])
        assert len(runner._runner._programs) == 3  # of 64, 128 and 256 tokens


def test_programs_that_were_not_used_for_long_are_dropped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs_module, "MAX_PROGRAMS", 2)
    with programs.executor(generated(folder, "llama", "Q8_0")) as runner:
        first = runner.forward([Step([1], runner.new_kv(1))])[0]
        for capacity in (100, 200, 400):
            np.testing.assert_array_equal(runner.forward([Step([1], runner.new_kv(capacity))])[0], first)
        assert len(runner._runner._programs) == 2


def test_a_cache_tells_its_size() -> None:
    kv = ProgramKV(3, 2, 64, 32, 100)
    assert kv.num_bytes == 3 * 2 * (64 + 32) * 2 * 100
    assert (kv.capacity_tokens, kv.length) == (100, 0)
    with pytest.raises(ValueError, match="0 tokens"):
        ProgramKV(1, 1, 64, 64, 0)
