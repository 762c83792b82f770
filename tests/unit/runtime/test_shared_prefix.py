"""Sequences that begin alike: rows are held once until one writes to them, and answers are the same."""

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_kernels.kv_policy import KVPolicy
from cpu_kernels.kv_types import KVType
from runtime.engine import Engine
from runtime.executor.program.kv import ProgramKV
from runtime.executor.program.kv_tiers import KVTiers
from runtime.generation import Request
from runtime.sampler import SamplingParams
from tests.support.models import FAMILIES, prompt, write_model

GREEDY = SamplingParams(temperature=0)
CAPACITY = 2048
BLOCK = 64


class Plain:
    """What a cache should hold: a block's bytes by its number."""

    def __init__(self, kv: ProgramKV, blocks: list[bytes]) -> None:
        self.kv, self.blocks = kv, blocks

    def append(self, rng: np.random.Generator, count: int) -> None:
        """Whole blocks, from the one that holds the first token behind."""
        first = self.kv.length // BLOCK
        del self.blocks[first:]
        for index in range(first, min(first + count, CAPACITY // BLOCK)):
            data = rng.integers(0, 256, self.kv.rows_layout.block_bytes, np.uint8)
            self.kv.import_block(index, data)
            self.kv.restored((index + 1) * BLOCK)
            self.blocks.append(data.tobytes())

    def check(self) -> None:
        """Every token of it is what was put there."""
        held = np.empty(self.kv.rows_layout.block_bytes, np.uint8)
        for index in range(self.kv.length // BLOCK):
            self.kv.export_block(index, held)
            assert held.tobytes() == self.blocks[index], index


ACTION = st.tuples(
    st.sampled_from(["append", "share", "truncate", "forget"]), st.integers(0, 7), st.integers(0, CAPACITY)
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(kind=st.sampled_from([KVType.F16, KVType.KIVI4]), actions=st.lists(ACTION, max_size=20))
def test_shared_caches_are_as_copies(kind: KVType, actions: list[tuple[str, int, int]]) -> None:
    tiers = KVTiers()
    _act(tiers, kind, actions)
    gc.collect()
    assert tiers.store.ram_bytes == 0, "memory goes back"


def _act(tiers: KVTiers, kind: KVType, actions: list[tuple[str, int, int]]) -> None:
    rng = np.random.default_rng(1)

    def new() -> ProgramKV:
        return ProgramKV(2, 1, 8, 8, CAPACITY, KVPolicy(kind, kind), tiers)

    caches = [Plain(new(), [])]
    for action, which, number in actions:
        its = caches[which % len(caches)]
        if action == "append":
            its.append(rng, number % 14)
        elif action == "truncate":
            its.kv.truncate(its.kv.cut_at(number % (its.kv.length + 1)))
        elif action == "share":
            kv = new()
            shared = kv.share(its.kv, number)
            assert shared == kv.length <= min(number, its.kv.length)
            caches.append(Plain(kv, its.blocks[: -(-shared // BLOCK)]))
        elif len(caches) > 1:
            caches.remove(its)
        for cache in caches:
            cache.check()


def test_only_what_is_written_to_is_copied() -> None:
    tiers = KVTiers()
    first, second = (ProgramKV(2, 1, 8, 8, CAPACITY, None, tiers) for _ in range(2))
    Plain(first, []).append(np.random.default_rng(1), 20)  # three pieces
    whole = tiers.store.ram_bytes
    assert second.share(first, 1200) == 1200
    assert tiers.store.ram_bytes == whole
    second.prepare(1200, 1201)
    assert tiers.store.copied == 2, "the last piece's chunk of each layer"
    assert tiers.store.ram_bytes == whole + first.layout.piece_bytes
    first.prepare(1280, 1281)
    assert tiers.store.copied == 2, "it belongs to one sequence again"


def test_caches_of_others_cannot_be_shared() -> None:
    first, second = (ProgramKV(2, 1, 8, 8, CAPACITY) for _ in range(2))
    with pytest.raises(ValueError, match="of the same kind"):
        second.share(first, 0)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    path = write_model(Path(tmp_path_factory.mktemp("models")) / "llama.gguf", FAMILIES["llama"], "Q8_0")
    with Engine(path, threads=1, context_tokens=2048, gpu="off") as made:
        yield made


@pytest.mark.parametrize("parallel", [1, 2, 6])
def test_a_batch_computes_a_common_prefix_once(engine: Engine, parallel: int) -> None:
    system = prompt(length=200)
    prompts = [[*system, *range(5 + 7 * number, 15 + 7 * number)] for number in range(4)] + [system[:150], [7, 8, 9]]
    requests = [Request(ids, GREEDY, (), 6) for ids in prompts]
    expected = [[piece.token_id for piece in engine.generate(ids, sampling=GREEDY, max_tokens=6)] for ids in prompts]
    before = engine.shared_tokens
    answers = dict(engine.stream_batch(requests, parallel=parallel))
    assert [list(answers[index].token_ids) for index in range(len(prompts))] == expected
    assert engine.shared_tokens - before >= 3 * 200 + 149


def test_answers_to_one_prompt_share_it(engine: Engine) -> None:
    ids = prompt(length=120)
    requests = [Request(ids, SamplingParams(seed=number), (), 8) for number in range(4)]
    expected = [
        [piece.token_id for piece in engine.generate(ids, sampling=its.sampling, max_tokens=8)] for its in requests
    ]
    before = engine.shared_tokens
    answers = dict(engine.stream_batch(requests, parallel=4))
    assert [list(answers[index].token_ids) for index in range(4)] == expected
    assert engine.shared_tokens - before == 3 * 119
