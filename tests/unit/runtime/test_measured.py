"""What a run's caches of experts have seen, as rates that a profile learns from."""

from offload.cache_counts import CacheCounts
from runtime.measured import ExpertCounts


def test_one_memory_has_hits_alone() -> None:
    counts = ExpertCounts(ram=CacheCounts(lookups=2000, misses=500))
    assert (counts.hit_rate, counts.found_rate) == (0.75, None)
    assert ExpertCounts(ram=CacheCounts(lookups=10)).hit_rate is None
    assert ExpertCounts().hit_rate is None


def test_what_either_memory_has_is_found() -> None:
    gpu, ram = CacheCounts(lookups=4000, misses=1000), CacheCounts(lookups=3000, misses=500, foreseen_used=100)
    counts = ExpertCounts(gpu, ram)
    assert counts.hit_rate == 0.75
    assert counts.found_rate == 1 - 600 / 6000


def test_what_came_after() -> None:
    before = ExpertCounts(CacheCounts(lookups=1000, misses=1000), CacheCounts(lookups=1000, misses=1000))
    after = ExpertCounts(CacheCounts(lookups=3000, misses=2000), CacheCounts(lookups=2000, misses=1000))
    since = after.since(before)
    assert since.gpu == CacheCounts(lookups=2000, misses=1000)
    assert since.found_rate == 1.0
    assert after.since(ExpertCounts()) == after
