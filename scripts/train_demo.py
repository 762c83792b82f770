"""Train the demo family: one byte-level BPE vocabulary, a mixture-of-experts target and a small dense draft.

    python scripts/train_demo.py tokenizer stories.txt:10 books.txt.xz:0.33 --data DIR
    python scripts/train_demo.py train moe --data DIR --minutes 20 --device cuda --compile
    python scripts/train_demo.py train draft --data DIR --minutes 5 --teacher moe
    python scripts/train_demo.py export moe --data DIR --type Q8_0 --to demo.gguf

Texts are documents separated by `<|endoftext|>`; FILE:TIMES repeats a file's training documents, or thins them where
TIMES is below 1. The architectures are ones that GGUF runtimes know: `qwen3moe` for the target and `qwen3` for the
draft, with tied embeddings. Training can be paused (`--pause-minutes`) and taken up again (`--resume`); the learning
rate follows the whole budget.
"""

import argparse
import json
import lzma
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = [END_OF_TEXT, "<|im_start|>", "<|im_end|>"]
END_OF_TEXT_ID = 0
# How the vocabulary `qwen2` of GGUF splits text before byte pairs are merged.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|\s?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VALIDATION_DOCUMENTS = 100  # of every text, kept out of training
CAPACITY_FACTOR = 1.5  # rows an expert has in training, over its even share
BALANCE_WEIGHT = 0.01  # of the loss that spreads tokens evenly over experts (Fedus et al., Switch Transformers, 2021)
WARMUP_STEPS = 100


@dataclass(frozen=True, slots=True)
class Shape:
    """Hyper-parameters of a model; `experts` 0 makes it dense."""

    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    ffn: int = 256
    experts: int = 0
    experts_used: int = 0
    vocabulary: int = 4096
    context: int = 512
    rope_base: float = 10000.0
    epsilon: float = 1e-6


SHAPES = {"moe": Shape(experts=16, experts_used=2), "draft": Shape(layers=1)}


class Attention(nn.Module):
    """Causal grouped-query attention with norms on queries and keys and rotary positions in NEOX order."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.attn_q = nn.Linear(shape.hidden, shape.heads * shape.head_dim, bias=False)
        self.attn_k = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.attn_v = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.attn_output = nn.Linear(shape.heads * shape.head_dim, shape.hidden, bias=False)
        self.attn_q_norm = nn.RMSNorm(shape.head_dim, shape.epsilon)
        self.attn_k_norm = nn.RMSNorm(shape.head_dim, shape.epsilon)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """(batch, tokens, hidden) -> the same; `cosine` and `sine` are (tokens, head_dim / 2)."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q = rotated(self.attn_q_norm(self.attn_q(x).float().view(heads)).transpose(1, 2), cosine, sine)
        k = rotated(self.attn_k_norm(self.attn_k(x).float().view(heads)).transpose(1, 2), cosine, sine)
        v = self.attn_v(x).view(heads).transpose(1, 2)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out: Tensor = self.attn_output(y.transpose(1, 2).flatten(2))
        return out


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions: element i of (batch, heads, tokens, head_dim) pairs with i + head_dim / 2."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)


class DenseFFN(nn.Module):
    """The gated feed-forward network."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.ffn_gate = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.ffn_up = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.ffn_down = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, tokens, hidden) -> the same, and no balance loss."""
        return self.ffn_down(functional.silu(self.ffn_gate(x)) * self.ffn_up(x)), x.new_zeros(())


class ExpertFFN(nn.Module):
    """Routed experts, the weights of those chosen normalised to a sum of 1.

    All shapes are fixed, so that it can be compiled: in training an expert has a bounded number of rows and passes over
    the tokens beyond, in evaluation it has room for all.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.experts, self.used = shape.experts, shape.experts_used
        self.ffn_gate_inp = nn.Linear(shape.hidden, shape.experts, bias=False)
        self.ffn_gate_exps = nn.Parameter(torch.randn(shape.experts, shape.ffn, shape.hidden) * 0.02)
        self.ffn_up_exps = nn.Parameter(torch.randn(shape.experts, shape.ffn, shape.hidden) * 0.02)
        self.ffn_down_exps = nn.Parameter(torch.randn(shape.experts, shape.hidden, shape.ffn) * 0.02)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, tokens, hidden) -> the same, and the balance loss."""
        x = inputs.flatten(0, 1)
        chances = self.ffn_gate_inp(x).float().softmax(-1)
        weights, chosen = chances.topk(self.used, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        expert, order = chosen.flatten().sort(stable=True)  # choices in groups, expert by expert
        counts = torch.zeros(self.experts, dtype=torch.long, device=x.device).index_add(0, expert, expert * 0 + 1)
        rank = torch.arange(len(expert), device=x.device) - (counts.cumsum(0) - counts)[expert]
        capacity = self._capacity(len(x))
        spare = self.experts * capacity  # one more row takes what does not fit
        row = torch.where(rank < capacity, expert * capacity + rank, spare)
        token = order // self.used
        rows = x.new_zeros(spare + 1, x.shape[1]).index_copy(0, row, x[token])
        answers = self._apply_experts(rows[:-1].view(self.experts, capacity, -1)).view(spare, -1)
        answers = torch.cat([answers, answers.new_zeros(1, answers.shape[1])])[row]
        weighted = answers * weights.flatten()[order].unsqueeze(-1).to(answers.dtype)
        out = torch.zeros_like(x).index_add(0, token, weighted.to(x.dtype))
        balance = self.experts * (counts.float() / counts.sum() * chances.mean(0)).sum()
        return out.view_as(inputs), balance

    def _capacity(self, tokens: int) -> int:
        """Rows of each expert, in steps of 64."""
        share = CAPACITY_FACTOR * tokens * self.used / self.experts
        return min(tokens, math.ceil(share / 64) * 64) if self.training else tokens

    def _apply_experts(self, rows: Tensor) -> Tensor:
        """(experts, capacity, hidden) -> the same, each expert on its own rows."""
        gate = functional.silu(torch.bmm(rows, self.ffn_gate_exps.transpose(1, 2).to(rows.dtype)))
        up = torch.bmm(rows, self.ffn_up_exps.transpose(1, 2).to(rows.dtype))
        return torch.bmm(gate * up, self.ffn_down_exps.transpose(1, 2).to(up.dtype))


class Block(nn.Module):
    """One layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(shape.hidden, shape.epsilon)
        self.attention = Attention(shape)
        self.ffn_norm = nn.RMSNorm(shape.hidden, shape.epsilon)
        self.ffn = ExpertFFN(shape) if shape.experts else DenseFFN(shape)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, tokens, hidden) -> the same, and the balance loss."""
        x = x + self.attention(self.attn_norm(x), cosine, sine)
        y, balance = self.ffn(self.ffn_norm(x))
        return x + y, balance


class LanguageModel(nn.Module):
    """Token ids to logits, the embedding serving as output too."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Embedding(shape.vocabulary, shape.hidden)
        self.blk = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.output_norm = nn.RMSNorm(shape.hidden, shape.epsilon)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        frequencies = shape.rope_base ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        angles = torch.outer(torch.arange(shape.context), frequencies)
        self.cosine: Tensor
        self.sine: Tensor
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, tokens) -> logits (batch, tokens, vocabulary) and the balance loss of all layers."""
        x = self.token_embd(ids)
        cosine, sine = self.cosine[: ids.shape[1]], self.sine[: ids.shape[1]]
        balance = x.new_zeros(())
        for block in self.blk:
            x, layer_balance = block(x, cosine, sine)
            balance = balance + layer_balance
        return functional.linear(self.output_norm(x), self.token_embd.weight), balance


def make_tokenizer(sources: Sequence[str], data: Path, vocabulary: int = 4096) -> tuple[int, int]:
    """Train the vocabulary on the texts and write `tokenizer.json`, `train.u16` and `valid.u16`; tokens in each."""
    texts = [(documents(path), times) for path, times in map(parse_source, sources)]
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((document for text, _ in texts for document in text), trainer)
    data.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(data / "tokenizer.json"))
    training, validation = [], []
    for text, times in texts:
        held_out = min(VALIDATION_DOCUMENTS, len(text) // 10)
        kept = text[: held_out + math.ceil((len(text) - held_out) * min(1.0, times))]
        encoded = list(encode(tokenizer, kept))
        validation += encoded[:held_out]
        training += encoded[held_out:] * max(1, round(times))
    np.random.default_rng(0).shuffle(training)
    np.concatenate(training).tofile(data / "train.u16")
    np.concatenate(validation).tofile(data / "valid.u16")
    return sum(map(len, training)), sum(map(len, validation))


def parse_source(source: str) -> tuple[Path, float]:
    """FILE or FILE:TIMES as path and factor."""
    path, _, times = source.partition(":")
    return Path(path), float(times or 1.0)


def documents(path: Path) -> list[str]:
    """The documents of a text, plain or `.xz`, in a random but fixed order."""
    raw = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    found = [text for part in raw.decode(errors="replace").split(END_OF_TEXT) if (text := part.strip())]
    np.random.default_rng(0).shuffle(found)
    return found


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[NDArray[np.uint16]]:
    """Each text's token ids with the end-of-text token behind them; a bounded number of texts at a time."""
    for start in range(0, len(texts), 4096):
        for encoding in tokenizer.encode_batch(texts[start : start + 4096]):
            yield np.array([*encoding.ids, END_OF_TEXT_ID], dtype=np.uint16)


@dataclass(frozen=True, slots=True)
class Training:
    """How long and how to train. The budget is `steps` where given, else `minutes` of computing."""

    minutes: float = 20.0
    steps: int | None = None
    pause_minutes: float | None = None
    resume: bool = False
    batch: int = 16
    sequence: int | None = None
    learning_rate: float = 3e-3
    device: str = "cpu"
    compiled: bool = False
    seed: int = 0

    def progress(self, step: int, elapsed_s: float) -> float:
        """How much of the budget is used up, 1 at the end."""
        return step / self.steps if self.steps is not None else elapsed_s / (self.minutes * 60)

    def rate(self, step: int, progress: float) -> float:
        """The learning rate: a linear warm-up, then a cosine down to 5%."""
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.learning_rate * min(1.0, (step + 1) / WARMUP_STEPS) * (0.05 + 0.95 * cosine)


class Windows:
    """Windows of `length` tokens of a token file, each with the targets one token on."""

    def __init__(self, path: Path, length: int, device: str) -> None:
        tokens = np.fromfile(path, dtype=np.uint16).astype(np.int32)
        if len(tokens) <= length:
            raise SystemExit(f"{path} has {len(tokens)} tokens; windows of {length} need more text")
        self.length = length
        self.last = len(tokens) - length - 1
        self.tokens = torch.from_numpy(tokens).to(device)

    def at(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (count, length) each, of the windows that begin at `starts` (count,)."""
        places = (starts[:, None] + torch.arange(self.length + 1)).to(self.tokens.device)
        windows = self.tokens[places].long()
        return windows[:, :-1], windows[:, 1:]


def train(
    shape: Shape, data: Path, checkpoint: Path, training: Training, teacher: LanguageModel | None = None
) -> float | None:
    """Train until the budget is used up and return the validation loss in nats a token, None where only paused.

    With a `teacher` the student learns its distribution (the Kullback-Leibler divergence from it) instead of the text.
    """
    torch.manual_seed(training.seed)
    model = LanguageModel(shape).to(training.device)
    optimizer = make_optimizer(model, training)
    generator = torch.Generator().manual_seed(training.seed)
    step, before_s = 0, 0.0
    if training.resume:
        saved = torch.load(checkpoint, map_location=training.device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"].cpu())
        step, before_s = saved["step"], saved["elapsed_s"]
    windows = Windows(data / "train.u16", training.sequence or shape.context, training.device)
    run = torch.compile(model) if training.compiled else model
    started, elapsed_s = time.monotonic(), before_s
    while (progress := training.progress(step, elapsed_s)) < 1:
        if training.pause_minutes is not None and elapsed_s - before_s >= training.pause_minutes * 60:
            state = {"optimizer": optimizer.state_dict(), "generator": generator.get_state()}
            save(checkpoint, model, step=step, elapsed_s=elapsed_s, **state)
            return None
        for group in optimizer.param_groups:
            group["lr"] = training.rate(step, progress)
        starts = torch.randint(windows.last + 1, (training.batch,), generator=generator)
        loss = training_loss(run, windows.at(starts), teacher)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 50 == 0:
            print(f"step {step}, {100 * progress:.0f}%, loss {loss.item():.3f}", flush=True)
        elapsed_s = before_s + time.monotonic() - started
    validation = validation_loss(model, Windows(data / "valid.u16", windows.length, training.device))
    seen = step * training.batch * windows.length
    save(checkpoint, model, step=step, elapsed_s=elapsed_s, validation=validation, seen=seen)
    print(f"validation loss {validation:.4f} nats/token after {step} steps, {seen / 1e6:.1f}M tokens", flush=True)
    return validation


def make_optimizer(model: LanguageModel, training: Training) -> torch.optim.Optimizer:
    """AdamW; norms do not decay."""
    matrices, vectors = ([p for p in model.parameters() if (p.ndim >= 2) is wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=(0.9, 0.95), fused=training.device != "cpu")


def training_loss(
    run: Callable[[Tensor], tuple[Tensor, Tensor]], batch: tuple[Tensor, Tensor], teacher: LanguageModel | None
) -> Tensor:
    """The loss of one batch with what keeps the experts balanced."""
    inputs, targets = batch
    with torch.autocast(inputs.device.type, torch.bfloat16):
        logits, balance = run(inputs)
        if teacher is None:
            loss = functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        else:
            with torch.no_grad():
                wanted = teacher(inputs)[0].float().log_softmax(-1).flatten(0, 1)
            own = logits.float().log_softmax(-1).flatten(0, 1)
            loss = functional.kl_div(own, wanted, log_target=True, reduction="batchmean")
        return loss + BALANCE_WEIGHT * balance


def validation_loss(model: LanguageModel, windows: Windows, batches: int = 20) -> float:
    """Mean loss in nats a token over windows spread through the held-out text, in float32, no token passed over."""
    model.eval()
    losses = []
    with torch.no_grad():
        for starts in torch.linspace(0, windows.last, 8 * batches, dtype=torch.float64).long().view(batches, 8):
            inputs, targets = windows.at(starts)
            losses.append(functional.cross_entropy(model(inputs)[0].flatten(0, 1), targets.flatten()).item())
    return float(np.mean(losses))


def save(checkpoint: Path, model: LanguageModel, **state: Any) -> None:
    """Write a checkpoint, complete or not at all."""
    partial = checkpoint.with_suffix(".partial")
    torch.save({"shape": asdict(model.shape), "model": model.state_dict(), **state}, partial)
    partial.replace(checkpoint)


def load(checkpoint: Path, device: str) -> LanguageModel:
    """The model of a checkpoint, ready to be asked."""
    saved = torch.load(checkpoint, map_location=device)
    model = LanguageModel(Shape(**saved["shape"])).to(device)
    model.load_state_dict(saved["model"])
    return model.eval()


def export(checkpoint: Path, data: Path, target: Path, quant_type: str = "Q8_0", name: str = "strata demo") -> None:
    """Write a checkpoint as GGUF; norms and the router stay F32, everything else becomes `quant_type` (F16 or Q8_0)."""
    saved = torch.load(checkpoint, map_location="cpu")
    shape = Shape(**saved["shape"])
    writer = gguf.GGUFWriter(str(target), "qwen3moe" if shape.experts else "qwen3")
    writer.add_name(name)
    if "validation" in saved:
        writer.add_description(f"validation loss {saved['validation']:.4f} nats/token after {saved['seen']} tokens")
    write_hyperparameters(writer, shape)
    write_vocabulary(writer, data / "tokenizer.json", shape.vocabulary)
    quantized = gguf.GGMLQuantizationType[quant_type]
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{quant_type}"])
    if quantized is gguf.GGMLQuantizationType.Q8_0:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, tensor in saved["model"].items():
        values = tensor.float().numpy()
        plain = values.ndim < 2 or "ffn_gate_inp" in key
        kind = gguf.GGMLQuantizationType.F32 if plain else quantized
        # Parameters bear GGUF's names already, but for two modules that only group, and experts without a suffix.
        name = key.replace(".attention.", ".").replace(".ffn.", ".").removesuffix(".weight") + ".weight"
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_hyperparameters(writer: gguf.GGUFWriter, shape: Shape) -> None:
    """The metadata of the architecture."""
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.epsilon)
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(shape.experts_used)
        writer.add_expert_feed_forward_length(shape.ffn)


def write_vocabulary(writer: gguf.GGUFWriter, path: Path, size: int) -> None:
    """The metadata of the tokenizer; ids the training of the vocabulary left free become unused tokens."""
    trained = json.loads(path.read_text(encoding="utf-8"))
    tokens = sorted(trained["model"]["vocab"], key=trained["model"]["vocab"].__getitem__)
    unused = [f"[PAD{index}]" for index in range(len(tokens), size)]
    kinds = [gguf.TokenType.CONTROL if token in SPECIAL_TOKENS else gguf.TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens + unused)
    writer.add_token_types(kinds + [gguf.TokenType.UNUSED] * len(unused))
    writer.add_token_merges([" ".join(merge) for merge in trained["model"]["merges"]])
    writer.add_bos_token_id(END_OF_TEXT_ID)
    writer.add_eos_token_id(END_OF_TEXT_ID)
    writer.add_pad_token_id(END_OF_TEXT_ID)
    writer.add_add_bos_token(False)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    tokenizer = commands.add_parser("tokenizer", help="train the vocabulary and encode the texts")
    tokenizer.add_argument("sources", nargs="+", metavar="FILE[:TIMES]")
    tokenizer.add_argument("--vocabulary", type=int, default=4096)
    training = commands.add_parser("train", help="train a model")
    training.add_argument("kind", choices=SHAPES)
    training.add_argument("--minutes", type=float, default=20.0)
    training.add_argument("--steps", type=int, help="train so many steps, however long they take")
    training.add_argument("--pause-minutes", type=float, help="stop after so long, to be resumed")
    training.add_argument("--resume", action="store_true")
    training.add_argument("--batch", type=int, default=16)
    training.add_argument("--sequence", type=int, help="tokens of a window; the whole context by default")
    training.add_argument("--learning-rate", type=float, default=3e-3)
    training.add_argument("--device", default="cpu")
    training.add_argument("--compile", dest="compiled", action="store_true")
    training.add_argument("--teacher", choices=SHAPES, help="learn the distribution of this trained model")
    writing = commands.add_parser("export", help="write a trained model as GGUF")
    writing.add_argument("kind", choices=SHAPES)
    writing.add_argument("--type", choices=["F16", "Q8_0"], default="Q8_0")
    writing.add_argument("--to", type=Path, required=True)
    for command in (tokenizer, training, writing):
        command.add_argument("--data", type=Path, required=True, help="folder of vocabulary, tokens and checkpoints")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the commands."""
    options = parse_arguments(arguments)
    if options.command == "tokenizer":
        training, validation = make_tokenizer(options.sources, options.data, options.vocabulary)
        print(f"{training} tokens to train on, {validation} to validate")
        return
    checkpoint = options.data / f"{options.kind}.pt"
    if options.command == "export":
        export(checkpoint, options.data, options.to, options.type, f"strata demo {options.kind}")
        print(f"wrote {options.to}, {options.to.stat().st_size} bytes")
    else:
        chosen = {name: getattr(options, name) for name in Training.__slots__ if hasattr(options, name)}
        teacher = load(options.data / f"{options.teacher}.pt", options.device) if options.teacher else None
        train(SHAPES[options.kind], options.data, checkpoint, Training(**chosen), teacher)


if __name__ == "__main__":
    main()
