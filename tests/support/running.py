"""Runs a model file with the sequential executor."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from offload.gguf import GGUFFile
from runtime.architectures import describe
from runtime.executor import Step
from runtime.executor.sequential import SequentialExecutor
from runtime.weights import Weights

torch.set_num_threads(1)  # quickest for small models, and it leaves the other cores to other tests


@contextmanager
def executor(
    path: Path,
    *,
    resident: bool = True,
    kv_dtype: torch.dtype = torch.float16,
    weights_class: type[Weights] = Weights,
) -> Iterator[SequentialExecutor]:
    """An executor on the CPU, closed at the end."""
    with GGUFFile.open(path) as file:
        model = describe(file)
        weights = weights_class(file, model, resident=resident, device=torch.device("cpu"))
        weights.load()
        runner = SequentialExecutor(model, weights, kv_dtype=kv_dtype)
        yield runner
        runner.close()


def logits_of(
    path: Path,
    ids: Sequence[int],
    *,
    capacity_tokens: int = 128,
    kv_dtype: torch.dtype = torch.float32,
    weights_class: type[Weights] = Weights,
) -> NDArray[np.float32]:
    """Logits of every position, (tokens, vocab)."""
    with executor(path, kv_dtype=kv_dtype, weights_class=weights_class) as runner:
        return runner.forward([Step(ids, runner.new_kv(capacity_tokens))], logits="all")[0]


def greedy(path: Path, ids: Sequence[int], count: int) -> list[int]:
    """The `count` tokens that follow when the most probable one is always taken."""
    with executor(path) as runner:
        kv = runner.new_kv(len(ids) + count)
        tokens: list[int] = []
        step = list(ids)
        while len(tokens) < count:
            tokens.append(int(runner.forward([Step(step, kv)])[0][-1].argmax()))
            step = tokens[-1:]
        return tokens
