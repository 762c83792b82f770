"""Routing traces: recording, files sound and damaged, replays, and Belady's bound against every other choice."""

import time
import zipfile
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import FlashError, ModelFormatError
from offload.policies import PolicyName
from offload.routing_trace import RoutingTrace, TraceRecorder
from offload.synthetic_trace import synthetic_trace
from offload.trace_replay import belady, hit_curve, replay


def _trace(ids, experts=8, sequence=(0,)) -> RoutingTrace:
    return RoutingTrace("test", experts, np.array(ids, np.int16), np.array(sequence, np.int64))


def _equal(a: RoutingTrace, b: RoutingTrace) -> bool:
    same_weights = a.topk_weights is b.topk_weights or (
        a.topk_weights is not None and np.array_equal(a.topk_weights, b.topk_weights)
    )
    same = (a.model, a.experts) == (b.model, b.experts) and same_weights
    return same and np.array_equal(a.topk_ids, b.topk_ids) and np.array_equal(a.sequence, b.sequence)


# recording


def test_what_was_recorded_is_the_trace():
    recorder = TraceRecorder("test", layers=2, experts=8, used=2)
    recorder.begin_sequence()
    recorder.add(0, np.array([[1, 2], [3, 4], [5, 6]]))
    recorder.add(1, np.array([[0, 1], [1, 2], [2, 3]]))
    recorder.end_step()
    recorder.begin_sequence()
    recorder.begin_sequence()
    recorder.add(1, np.array([[7, 0]]))
    recorder.add(0, np.array([[6, 5]]))
    recorder.end_step()
    recorder.end_step()
    recorder.begin_sequence()
    trace = recorder.trace()
    assert (trace.tokens, trace.layers, trace.used, trace.experts) == (4, 2, 2, 8)
    assert trace.topk_ids[:, 0].tolist() == [[1, 2], [3, 4], [5, 6], [6, 5]]
    assert trace.topk_ids[:, 1].tolist() == [[0, 1], [1, 2], [2, 3], [7, 0]]
    assert trace.sequence.tolist() == [0, 3]
    assert trace.topk_weights is None


def test_what_is_added_is_copied():
    recorder = TraceRecorder("test", 1, 8, 2)
    ids, weights = np.array([[1, 2]], np.int16), np.array([[0.75, 0.25]], np.float32)
    recorder.add(0, ids, weights)
    ids[:], weights[:] = 0, 0
    recorder.end_step()
    assert recorder.trace().topk_ids.tolist() == [[[1, 2]]]
    assert recorder.trace().topk_weights.tolist() == [[[0.75, 0.25]]]


def test_weights_are_kept_only_where_every_step_has_them():
    recorder = TraceRecorder("test", 1, 8, 1)
    recorder.add(0, np.array([[1]]), np.array([[1.0]]))
    recorder.end_step()
    recorder.add(0, np.array([[2]]))
    recorder.end_step()
    assert recorder.trace().topk_weights is None


def test_steps_that_are_not_whole_are_refused_and_dropped():
    recorder = TraceRecorder("test", 2, 8, 1)
    recorder.add(0, np.array([[1]]))
    with pytest.raises(ValueError, match="1 of 2 layers"):
        recorder.end_step()
    recorder.add(0, np.array([[1]]))
    with pytest.raises(ValueError, match="layer 0"):
        recorder.add(0, np.array([[1]]))
    with pytest.raises(ValueError, match="layer 2"):
        recorder.add(2, np.array([[1]]))
    with pytest.raises(ValueError, match="shape"):
        recorder.add(1, np.array([[1, 2]]))
    recorder.drop_step()
    recorder.add(0, np.array([[1]]))
    recorder.add(1, np.array([[1], [2]]))
    with pytest.raises(ValueError, match="different lengths"):
        recorder.end_step()
    assert recorder.trace().tokens == 0


@pytest.mark.parametrize(
    ("ids", "experts", "sequence"),
    [
        ([[[0, 8]]], 8, [0]),
        ([[[-1, 2]]], 8, [0]),
        ([[[3, 3]]], 8, [0]),
        ([[[0, 1, 2]]], 2, [0]),
        ([[0, 1]], 8, [0]),
        ([[[0]]], 0, [0]),
        ([[[0]]], 8, []),
        ([[[0]]], 8, [1]),
        ([[[0]]], 8, [0, 1]),
        ([[[0]], [[0]]], 8, [0, 0]),
        ([[[0]]], 8, [[0]]),
    ],
)
def test_contradictions_are_refused(ids, experts, sequence):
    with pytest.raises(ValueError, match=r"."):
        _trace(ids, experts, sequence)


@pytest.mark.parametrize("weights", [np.zeros((1, 1, 1), np.float32), np.full((1, 1, 2), np.nan, np.float32)])
def test_weights_that_are_not_one_a_use_are_refused(weights):
    with pytest.raises(ValueError, match="weights"):
        RoutingTrace("test", 8, np.array([[[0, 1]]], np.int16), np.zeros(1, np.int64), weights)


# files


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_a_file_reads_back_equal(tmp_path: Path, tokens: int):
    for trace in (synthetic_trace(2, 8, 3, tokens), _trace(np.zeros((tokens, 2, 1)), 8, [0][:tokens])):
        trace.save(tmp_path / "trace.npz")
        assert _equal(RoutingTrace.load(tmp_path / "trace.npz"), trace)
    assert [path.name for path in tmp_path.iterdir()] == ["trace.npz"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "trace.npz"
    old = synthetic_trace(1, 4, 1, 3)
    old.save(path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(FlashError, match="No space left"):
        synthetic_trace(1, 4, 1, 9).save(path)
    assert _equal(RoutingTrace.load(path), old)
    assert [one.name for one in tmp_path.iterdir()] == ["trace.npz"]
    with pytest.raises(FlashError, match="cannot be written"):
        old.save(tmp_path / "none" / "trace.npz")


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(FlashError, match="No such file"):
        RoutingTrace.load(tmp_path / "trace.npz")
    with pytest.raises(FlashError, match="directory"):
        RoutingTrace.load(tmp_path)


def test_every_cut_and_every_damaged_byte_is_found(tmp_path: Path):
    """A flipped bit is refused, or it lies where the archive keeps what is of no account, such as a time."""
    path = tmp_path / "trace.npz"
    trace = synthetic_trace(2, 8, 2, 5, seed=1)
    trace.save(path)
    sound = path.read_bytes()
    for length in range(0, len(sound), 3):
        path.write_bytes(sound[:length])
        with pytest.raises(ModelFormatError):
            RoutingTrace.load(path)
    for place in range(len(sound)):
        broken = bytearray(sound)
        broken[place] ^= 1 << place % 8
        path.write_bytes(broken)
        try:
            read = RoutingTrace.load(path)
        except (ModelFormatError, FlashError):
            continue
        assert _equal(read, trace), place


def _write(path: Path, **changed: object) -> None:
    arrays = {
        "format": "strata-routing-trace",
        "version": 1,
        "model": "test",
        "experts": 4,
        "topk_ids": np.zeros((1, 1, 1), np.int16),
        "sequence": np.zeros(1, np.int64),
        "topk_weights": np.zeros(0, np.float32),
    }
    np.savez(path, **{name: np.array(value) for name, value in {**arrays, **changed}.items()})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": "something"}, "is not a routing trace"),
        ({"version": 2}, "version 2, known is 1"),
        ({"topk_ids": np.full((1, 1, 1), 4, np.int16)}, "ids from 4 to 4 of 4 experts"),
        ({"topk_ids": np.zeros((1, 1, 1), np.int64)}, "type int64"),
        ({"experts": [1, 2]}, "damaged"),
        ({"sequence": np.array([3])}, "rising order"),
        ({"topk_weights": np.zeros((1, 1, 2), np.float32)}, "weights are not"),
        ({"more": 1}, "no part of one"),
    ],
)
def test_foreign_files(tmp_path: Path, changed: dict[str, object], message: str):
    path = tmp_path / "trace.npz"
    _write(path)
    assert RoutingTrace.load(path).tokens == 1
    _write(path, **changed)
    with pytest.raises(ModelFormatError, match=message) as error:
        RoutingTrace.load(path)
    assert error.value.hint is not None


def test_objects_and_sizes_out_of_all_proportion_are_refused(tmp_path: Path):
    path = tmp_path / "trace.npz"
    np.savez(path, format=np.array([{}], dtype=object))
    with pytest.raises(ModelFormatError):
        RoutingTrace.load(path)
    _write(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    header = members["topk_ids.npy"].replace(b"(1, 1, 1), }      ", b"(99999999999999, 1), }")
    for content in (header[:128], header[:128] + bytes(64)):
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in {**members, "topk_ids.npy": content}.items():
                archive.writestr(name, data)
        with pytest.raises(ModelFormatError):
            RoutingTrace.load(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {**members, "topk_ids.npy": bytes(1 << 22)}.items():
            archive.writestr(name, data)
    with pytest.raises(ModelFormatError, match="no part of one"):
        RoutingTrace.load(path)


def test_a_trace_of_another_model():
    trace = synthetic_trace(2, 8, 2, 5)
    trace.check_model("synthetic", 2, 8)
    for other in (("another", 2, 8), ("synthetic", 3, 8), ("synthetic", 2, 16)):
        with pytest.raises(ModelFormatError, match="the routing trace is of synthetic"):
            trace.check_model(*other)


# replays


def test_hits_by_hand():
    """Two slots, one layer: LRU loses 0 to 2; who knows the future keeps it."""
    trace = _trace([[[0]], [[1]], [[2]], [[0]], [[1]], [[1]]])
    assert replay(trace, 2, PolicyName.LRU).hits == 1
    best = belady(trace, 2)
    assert (best.hits, best.lookups) == (3, 6)
    assert best.hit_rate == 0.5
    assert best.misses_per_token == 0.5


def test_the_warm_up_does_not_count_and_fills_the_cache():
    trace = _trace([[[0]], [[1]], [[0]], [[1]]])
    for result in (replay(trace, 2, PolicyName.LRU, warm_up_tokens=2), belady(trace, 2, warm_up_tokens=2)):
        assert (result.hits, result.lookups, result.tokens) == (2, 2, 2)


def test_tokens_of_a_step_share_a_lookup_and_steps_end_with_their_sequence():
    trace = _trace([[[0, 1]], [[1, 2]], [[1, 2]], [[2, 3]]], sequence=(0, 3))
    result = replay(trace, 8, PolicyName.LRU, tokens_per_step=2)
    assert (result.lookups, result.hits) == (3 + 2 + 2, 2 + 1)
    assert belady(trace, 8, tokens_per_step=2) == result
    with pytest.raises(ValueError, match="steps of 0 tokens"):
        replay(trace, 8, PolicyName.LRU, tokens_per_step=0)


def test_a_cache_of_everything_misses_each_expert_once():
    trace = synthetic_trace(3, 8, 2, 50, zipf_exponent=0.3)
    touched = len({(layer, int(e)) for token in trace.topk_ids for layer, ids in enumerate(token) for e in ids})
    for name in PolicyName:
        assert (result := replay(trace, 24, name)).lookups - result.hits == touched
    assert belady(trace, 24).hits == replay(trace, 24, PolicyName.LRU).hits


@pytest.mark.parametrize("name", PolicyName)
def test_no_slots_and_no_tokens(name):
    assert replay(synthetic_trace(2, 4, 2, 5), 0, name).hits == 0
    empty = replay(synthetic_trace(2, 4, 2, 0), 4, name)
    assert (empty.lookups, empty.hit_rate, empty.misses_per_token) == (0, 0.0, 0.0)


_TRACES = st.builds(
    synthetic_trace,
    st.integers(1, 4),
    st.integers(3, 10),
    st.integers(1, 3),
    st.integers(1, 40),
    zipf_exponent=st.sampled_from([0.0, 0.5, 1.5]),
    reuse=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 1000),
)


@settings(max_examples=60, deadline=None)
@given(trace=_TRACES, slots=st.integers(0, 40), together=st.integers(1, 5), warm_up=st.integers(0, 10))
def test_nothing_exceeds_belady(trace, slots, together, warm_up):
    bound = belady(trace, slots, tokens_per_step=together, warm_up_tokens=warm_up)
    for name in PolicyName:
        result = replay(trace, slots, name, tokens_per_step=together, warm_up_tokens=warm_up)
        assert (result.lookups, result.tokens) == (bound.lookups, bound.tokens)
        assert 0 <= result.hits <= bound.hits <= bound.lookups


def _most_hits(trace: RoutingTrace, slots: int, warm_up: int) -> int:
    """By trying every choice of residents after every layer."""
    best: dict[frozenset[tuple[int, int]], int] = {frozenset(): 0}
    for number, token in enumerate(trace.topk_ids.tolist()):
        for layer, ids in enumerate(token):
            needed = {(layer, expert) for expert in ids}
            following: dict[frozenset[tuple[int, int]], int] = {}
            for residents, hits in best.items():
                after = hits + (len(needed & residents) if number >= warm_up else 0)
                there = sorted(residents | needed)
                for kept in combinations(there, min(slots, len(there))):
                    following[frozenset(kept)] = max(following.get(frozenset(kept), 0), after)
            best = following
    return max(best.values())


@settings(max_examples=40, deadline=None)
@given(
    trace=st.builds(
        synthetic_trace,
        st.integers(1, 2),
        st.integers(3, 4),
        st.integers(1, 2),
        st.integers(1, 6),
        seed=st.integers(0, 1000),
    ),
    slots=st.integers(1, 3),
    warm_up=st.integers(0, 2),
)
def test_belady_is_the_best_of_all_choices(trace, slots, warm_up):
    assert belady(trace, slots, warm_up_tokens=warm_up).hits == _most_hits(trace, slots, warm_up)


def test_the_curve_of_a_policy():
    trace = synthetic_trace(2, 16, 2, 100)
    curve = hit_curve(trace, PolicyName.LRU, [24, 8, 16, 8], warm_up_tokens=10)
    assert [slots for slots, _ in curve] == [8, 16, 24]
    rates = [rate for _, rate in curve]
    assert rates == sorted(rates)  # more slots never hurt LRU
    assert rates[1] == replay(trace, 16, PolicyName.LRU, warm_up_tokens=10).hit_rate


def test_replays_are_quick():
    """500 tokens of 16 layers with 8 of 64 experts; about 0.2 s on a quiet machine."""
    trace = synthetic_trace(16, 64, 8, 500)
    for run in (
        lambda: belady(trace, 512),
        *(lambda name=name: replay(trace, 512, name) for name in PolicyName),
    ):
        start = time.process_time()
        run()
        assert time.process_time() - start < 2.0


# traces made up


def test_synthetic_popularity_and_reuse_are_as_asked():
    trace = synthetic_trace(1, 32, 1, 8000, zipf_exponent=1.0, seed=2)
    counts = np.sort(np.bincount(trace.topk_ids.reshape(-1), minlength=32))[::-1]
    np.testing.assert_allclose(counts[:4] / counts[0], [1, 1 / 2, 1 / 3, 1 / 4], atol=0.05)
    trace = synthetic_trace(1, 64, 1, 8000, zipf_exponent=0.0, reuse=0.4, seed=2)
    again = (trace.topk_ids[1:] == trace.topk_ids[:-1]).mean()
    assert abs(again - (0.4 + 0.6 / 64)) < 0.02
    assert _equal(synthetic_trace(2, 8, 2, 9, seed=4), synthetic_trace(2, 8, 2, 9, seed=4))
    with pytest.raises(ValueError, match="no probability"):
        synthetic_trace(1, 4, 1, 1, reuse=1.5)
