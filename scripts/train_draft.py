"""Train a draft head for a model: it foretells the model's own hidden states, and with them its next tokens.

    python scripts/train_draft.py MODEL.gguf TEXT... --out head.npz [--minutes 4] [--tokens 300000] [--threads 2]

Texts are cut into windows; the model reads each once and its hidden states are kept. The head (see
runtime/speculative/head_program.py) learns to follow them for a few tokens on its own (EAGLE's loss: a smooth L1 on
hidden states, and cross-entropy to the model's own distribution). At the end it prints how often the head agrees with
the model's likeliest token, by position of a chain, on windows that it has not seen.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from cpu_kernels.reference.dequantize import dequantize
from offload.gguf import GGUFFile
from runtime.engine import Engine
from runtime.executor.base import FeatureExecutor, Step

WINDOW = 128
CHAIN = 4  # tokens that the head follows on its own in training
HELD_OUT = 0.05
BATCH = 8  # windows
FEATURE_WEIGHT = 1.0
INNER = 2  # times the width: the feed-forward part


@dataclass(frozen=True, slots=True)
class Windows:
    """Tokens (windows, WINDOW) and the hidden states behind each (windows, WINDOW, width)."""

    tokens: Tensor
    features: Tensor


class Head(nn.Module):
    """The head of runtime/speculative/head_program.py, for batches."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        width = table.shape[1]
        self.w1, self.w2 = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.wz = nn.Linear(2 * width, width, bias=False)
        self.wu, self.wd = nn.Linear(width, INNER * width, bias=False), nn.Linear(INNER * width, width, bias=False)
        self.embedding = nn.Embedding(len(table), width)
        with torch.no_grad():
            self.embedding.weight.copy_(table)
        nn.init.eye_(self.w1.weight)
        nn.init.zeros_(self.wd.weight)

    def forward(self, feature: Tensor, token_ids: Tensor) -> Tensor:
        """(..., width) and (...) -> (..., width)."""
        first = self.w1(feature)
        second = functional.silu(self.w2(_normed(self.embedding(token_ids))))
        gate = torch.sigmoid(self.wz(torch.cat([first, second], -1)))
        fused = gate * first + (1 - gate) * second
        out: Tensor = fused + self.wd(functional.silu(self.wu(_normed(fused))))
        return out

    def weights(self) -> dict[str, NDArray[np.float16]]:
        """As `HeadWeights` reads them."""
        named = {name: getattr(self, name).weight.T for name in ("w1", "w2", "wz", "wu", "wd")}
        named["embedding"] = self.embedding.weight
        return {name: value.detach().contiguous().numpy().astype(np.float16) for name, value in named.items()}


def _normed(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)


def read_windows(path: Path, texts: list[Path], tokens: int, threads: int) -> Windows:
    """The model's hidden states over the first `tokens` tokens of the texts, an equal share of each."""
    with Engine(path, context_tokens=WINDOW, threads=threads) as engine:
        assert isinstance(engine.executor, FeatureExecutor)
        ids: list[int] = []
        for text in texts:
            share = tokens // len(texts)
            ids += engine.tokenizer.encode(text.read_text()[: 5 * share], add_special=False)[:share]
        count = len(ids) // WINDOW
        kv, features = engine.executor.new_kv(WINDOW), []
        for window in range(count):
            kv.truncate(0)
            engine.executor.forward([Step(ids[window * WINDOW : (window + 1) * WINDOW], kv)], logits="none")
            features.append(engine.executor.features(WINDOW))
    order = torch.from_numpy(np.random.default_rng(0).permutation(count))
    return Windows(
        torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)[order], torch.from_numpy(np.stack(features))[order]
    )


def output_matrix(path: Path) -> Tensor:
    """The matrix (vocabulary, width) whose product with a hidden state are logits."""
    with GGUFFile.open(path) as gguf:
        tensor = gguf.tensors.get("output.weight") or gguf.tensors["token_embd.weight"]
        rows = dequantize(gguf.read(tensor), tensor.quant_type).reshape(tensor.shape)
    return torch.from_numpy(np.asarray(rows, np.float32))


def loss_of(head: Head, output: Tensor, windows: Windows, chain: int) -> Tensor:
    """Mean over the steps of chains that begin at every token; tokens are the text's, hidden states the head's own."""
    total = torch.zeros(())
    feature = windows.features[:, :-1]
    for step in range(chain):
        feature = head(feature, windows.tokens[:, 1 + step :])
        wanted = windows.features[:, 1 + step :]
        target = functional.softmax(wanted @ output.T, -1)
        total = total + functional.cross_entropy((feature @ output.T).flatten(0, 1), target.flatten(0, 1))
        total = total + FEATURE_WEIGHT * functional.smooth_l1_loss(feature, wanted)
        feature = feature[:, :-1]
    return total / chain


@torch.no_grad()
def agreement(head: Head, output: Tensor, windows: Windows) -> list[float]:
    """How often the head's likeliest token is the model's, by position, those before being right."""
    rates = []
    feature, alive = windows.features[:, :-1], torch.ones_like(windows.tokens[:, :-1], dtype=torch.bool)
    for step in range(CHAIN):
        feature = head(feature, windows.tokens[:, 1 + step :])
        same = (feature @ output.T).argmax(-1) == (windows.features[:, 1 + step :] @ output.T).argmax(-1)
        rates.append(float(same[alive].float().mean()))
        alive = (alive & same)[:, :-1]
        feature = feature[:, :-1]
    return rates


def train(head: Head, output: Tensor, windows: Windows, minutes: float) -> None:
    """AdamW with a learning rate that falls over the time."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3, weight_decay=0.01)
    started, step = time.monotonic(), 0
    while (share := (time.monotonic() - started) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * max(1 - share, 0.02)
        picked = torch.randint(0, len(windows.tokens), (BATCH,))
        batch = Windows(windows.tokens[picked], windows.features[picked])
        loss = loss_of(head, output, batch, 1 + (step % 3 == 0) * (CHAIN - 2))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}, {share:.0%} of the time, loss {loss.item():.3f}", flush=True)
        step += 1


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    started = time.monotonic()
    windows = read_windows(options.model, options.texts, options.tokens, options.threads)
    print(f"{windows.tokens.numel()} tokens read in {time.monotonic() - started:.1f} s", flush=True)
    held = max(1, int(HELD_OUT * len(windows.tokens)))
    output = output_matrix(options.model)
    head = Head(output)
    train(head, output, Windows(windows.tokens[held:], windows.features[held:]), options.minutes)
    rates = agreement(head, output, Windows(windows.tokens[:held], windows.features[:held]))
    np.savez(options.out, allow_pickle=False, **head.weights())
    print("agreement by position:", " ".join(f"{rate:.1%}" for rate in rates))
    print(options.out, f"{options.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
