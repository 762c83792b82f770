"""Train a small model that remembers: pairs of a key and its value lie in filler, and a key that comes again asks.

    python scripts/train_recall.py train --to recall.pt --minutes 10
    python scripts/train_recall.py export recall.pt --to recall.gguf
    python scripts/train_recall.py questions --to questions.jsonl --tokens 1024 --count 100

The architecture is `llama`, half of each head turned by positions. Layers 0 and 1 are trained to see two tokens alone,
at first always, then half of the time, so that looking up is learned by those behind them: they are what reads the KV
cache sparsely. A text is letters for filler, Hangul syllables for keys and digits with capitals for values, a token
each. Sequences grow longer as soon as the model answers well. Training goes on where `--to` is there already.
`questions` writes what `strata kv-eval --questions` reads.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

SPECIAL = ["<unk>", "<s>", "</s>"]
FILLER = "abcdefghijklmnopqrstuvwxyz.,;:"
VALUES = "0123456789ABCDEFGHIJKLMNOPQRSTUV"
KEYS = "".join(chr(0xAC00 + 16 * index) for index in range(512))
TOKENS = [*SPECIAL, *FILLER, *VALUES, *KEYS]
BOS_ID, EOS_ID = 1, 2
FIRST_FILLER = len(SPECIAL)
FIRST_VALUE = FIRST_FILLER + len(FILLER)
FIRST_KEY = FIRST_VALUE + len(VALUES)
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
TOKENS_A_STEP = 4096
GOOD = 0.97  # of questions answered, after which sequences grow
NEAR_TOKENS = 2  # that layers 0 and 1 see
NEAR_LAYERS = 2
NEAR_STAGES = 2  # of lengths in which they never see more


@dataclass(frozen=True, slots=True)
class Shape:
    """Hyper-parameters."""

    hidden: int = 64
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    turned: int = 16  # dimensions of a head
    ffn: int = 128
    vocabulary: int = len(TOKENS)
    context: int = 16384
    rope_base: float = 10000.0
    epsilon: float = 1e-5


class Block(nn.Module):
    """One layer, its parameters named as in GGUF."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.attn_norm = nn.RMSNorm(shape.hidden, shape.epsilon)
        self.attn_q = nn.Linear(shape.hidden, width, bias=False)
        self.attn_k = nn.Linear(shape.hidden, kv_width, bias=False)
        self.attn_v = nn.Linear(shape.hidden, kv_width, bias=False)
        self.attn_output = nn.Linear(width, shape.hidden, bias=False)
        self.ffn_norm = nn.RMSNorm(shape.hidden, shape.epsilon)
        self.ffn_gate = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.ffn_up = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.ffn_down = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """(batch, tokens, hidden) -> the same; `mask`: what is seen, None for all before."""
        normed = self.attn_norm(x)
        heads = (*x.shape[:2], -1, self.shape.head_dim)
        q, k, v = (part(normed).view(heads).transpose(1, 2) for part in (self.attn_q, self.attn_k, self.attn_v))
        q, k = (turned(part, angles, self.shape.turned) for part in (q, k))
        k, v = (part.repeat_interleave(self.shape.heads // self.shape.kv_heads, 1) for part in (k, v))
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + self.attn_output(y.transpose(1, 2).flatten(2))
        normed = self.ffn_norm(x)
        out: Tensor = x + self.ffn_down(functional.silu(self.ffn_gate(normed)) * self.ffn_up(normed))
        return out


def turned(x: Tensor, angles: tuple[Tensor, Tensor], count: int) -> Tensor:
    """Rotary positions of the first `count` dimensions of (batch, heads, tokens, head_dim), neighbors in pairs."""
    cos, sin = angles
    even, odd = x[..., 0:count:2], x[..., 1:count:2]
    pairs = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
    return torch.cat([pairs, x[..., count:]], -1)


class RecallModel(nn.Module):
    """Token ids to hidden states; the embedding serves as output too."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Embedding(shape.vocabulary, shape.hidden)
        self.blk = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.output_norm = nn.RMSNorm(shape.hidden, shape.epsilon)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.5 if "token_embd" in name else shape.hidden**-0.5)

    def forward(self, ids: Tensor, *, near: bool = False) -> Tensor:
        """(batch, tokens) -> (batch, tokens, hidden); `near`: layers 0 and 1 see a few tokens alone."""
        x = self.token_embd(ids)
        shape, tokens = self.shape, ids.shape[1]
        frequencies = shape.rope_base ** (-torch.arange(0, shape.turned, 2) / shape.turned)
        positions = torch.arange(tokens)
        turns = torch.outer(positions, frequencies)
        distance = positions[:, None] - positions
        window = (distance >= 0) & (distance < NEAR_TOKENS) if near else None
        for number, block in enumerate(self.blk):
            x = block(x, (turns.cos(), turns.sin()), window if number < NEAR_LAYERS else None)
        out: Tensor = self.output_norm(x)
        return out

    def answers(self, states: Tensor) -> Tensor:
        """(count, hidden) -> (count, vocabulary)."""
        return functional.linear(states, self.token_embd.weight)


def sequence(generator: np.random.Generator, tokens: int) -> tuple[NDArray[np.int64], list[int]]:
    """A text, and the places of the keys that ask."""
    ids = np.empty(tokens, np.int64)
    ids[0] = BOS_ID
    filler = generator.integers(FIRST_FILLER, FIRST_VALUE, tokens)
    values = generator.integers(FIRST_VALUE, FIRST_KEY, len(KEYS))
    keys = generator.permutation(len(KEYS))
    filling, asking = generator.uniform(0.1, 0.9), generator.uniform(0.3, 0.7)
    drawn = generator.random((tokens, 3))
    place, known, asked = 1, 0, []
    while place < tokens:
        chance = drawn[place]
        if chance[0] < filling or place + 1 == tokens:
            ids[place] = filler[place]
            place += 1
            continue
        if known and (known == len(keys) or chance[1] < asking):
            key = keys[int(chance[2] * known)]
            asked.append(place)
        else:
            key, known = keys[known], known + 1
        ids[place : place + 2] = FIRST_KEY + key, values[key]
        place += 2
    return ids, asked


def batch(generator: np.random.Generator, tokens: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (count, tokens), flat places of keys that ask, the values they ask for."""
    ids, asked = zip(*(sequence(generator, tokens) for _ in range(count)), strict=True)
    flat = np.concatenate(ids)
    places = np.array([number * tokens + place for number, each in enumerate(asked) for place in each], np.int64)
    return torch.from_numpy(np.stack(ids)), torch.from_numpy(places), torch.from_numpy(flat[places + 1])


def train(to: Path, minutes: float, rate: float, threads: int, seed: int) -> None:
    """Trains for so long and writes a checkpoint."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    model = RecallModel(Shape())
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    stage, right, step = 0, 0.0, 0
    if to.exists():
        saved = torch.load(to)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        stage, right, step = saved["stage"], saved["right"], saved["step"]
    generator = np.random.default_rng((seed, step))
    until = time.monotonic() + 60 * minutes
    while time.monotonic() < until:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100)
        tokens = LENGTHS[stage]
        ids, places, wanted = batch(generator, tokens, max(TOKENS_A_STEP // tokens, 1))
        near = stage < NEAR_STAGES or bool(generator.random() < 0.5)
        logits = model.answers(model(ids, near=near).flatten(0, 1)[places])
        loss = functional.cross_entropy(logits, wanted)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        right = 0.95 * right + 0.05 * (logits.argmax(-1) == wanted).float().mean().item()
        step += 1
        if right > GOOD and stage + 1 < len(LENGTHS):
            stage, right = stage + 1, 0.5
        if step % 50 == 0:
            print(f"step {step}, {tokens} tokens, loss {loss.item():.3f}, right {right:.3f}", flush=True)
    state = {"stage": stage, "right": right, "step": step, "optimizer": optimizer.state_dict()}
    torch.save({"shape": asdict(model.shape), "model": model.state_dict(), **state}, to)


def export(checkpoint: Path, target: Path) -> None:
    """Writes a checkpoint as GGUF, matrices as F16."""
    saved = torch.load(checkpoint, map_location="cpu")
    shape = Shape(**saved["shape"])
    writer = gguf.GGUFWriter(str(target), "llama")
    writer.add_name("strata recall")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.turned)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.epsilon)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([0.0] * len(TOKENS))
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * (len(TOKENS) - len(kinds)))
    writer.add_bos_token_id(BOS_ID)
    writer.add_eos_token_id(EOS_ID)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    for name, tensor in saved["model"].items():
        values = tensor.float().numpy()
        writer.add_tensor(name, values.astype(np.float16) if values.ndim > 1 else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def question(generator: np.random.Generator, tokens: int, pairs: int) -> tuple[str, str]:
    """A text of so many tokens (its start token aside) with `pairs` pairs, whose last key asks; the value."""
    places = np.sort(generator.choice((tokens - 1) // 2, pairs, replace=False)) * 2
    text = [FILLER[index] for index in generator.integers(0, len(FILLER), tokens)]
    keys = generator.permutation(len(KEYS))[:pairs]
    values = generator.integers(0, len(VALUES), pairs)
    for place, key, value in zip(places, keys, values, strict=True):
        text[place : place + 2] = KEYS[key], VALUES[value]
    asked = int(generator.integers(pairs))
    text[-1] = KEYS[keys[asked]]
    return "".join(text), VALUES[values[asked]]


def write_questions(target: Path, tokens: int, count: int, pairs: int, seed: int) -> None:
    """Lines of JSON: prompts and answers."""
    generator = np.random.default_rng(seed)
    asked = [question(generator, tokens, pairs) for _ in range(count)]
    lines = [json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False) for prompt, answer in asked]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train a model")
    training.add_argument("--minutes", type=float, default=10.0)
    training.add_argument("--rate", type=float, default=2e-3)
    training.add_argument("--threads", type=int, default=1)
    writing = commands.add_parser("export", help="write a trained model as GGUF")
    writing.add_argument("checkpoint", type=Path)
    asking = commands.add_parser("questions", help="write questions with their answers")
    asking.add_argument("--tokens", type=int, default=1024)
    asking.add_argument("--count", type=int, default=100)
    asking.add_argument("--pairs", type=int, default=64)
    for command in (training, asking):
        command.add_argument("--seed", type=int, default=0)
    for command in (training, writing, asking):
        command.add_argument("--to", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.command == "train":
        train(options.to, options.minutes, options.rate, options.threads, options.seed)
    elif options.command == "export":
        export(options.checkpoint, options.to)
    else:
        write_questions(options.to, options.tokens, options.count, options.pairs, options.seed)


if __name__ == "__main__":
    main()
