"""Model shapes of well-known sizes, without a file."""

from planner.model_shape import ModelShape, Unit, UnitKind

BITS = 4.5  # of Q4_0


def _unit(layer: int | None, kind: UnitKind, weights: int, matmuls: int, used: tuple[int, int] = (1, 1)) -> Unit:
    num_bytes = int(weights * BITS / 8)
    active = 0 if kind is UnitKind.EMBEDDING else weights * used[0] // used[1]
    active_bytes = int(active * BITS / 8)
    return Unit(
        name=kind.value if layer is None else f"blk.{layer}.{kind.value}",
        kind=kind,
        layer=layer,
        num_bytes=num_bytes,
        num_weights=weights,
        active_bytes=active_bytes,
        active_weights=active,
        active_bytes_by_type=(("Q4_0", active_bytes),),
        num_matmuls=matmuls,
        num_vectors=1,
        tensors=(),
    )


def make_shape(
    layers: int, hidden: int, ffn: int, kv_width: int, vocab: int, *, experts: int = 0, used: int = 0
) -> ModelShape:
    """A transformer of Q4_0 weights with grouped queries; `experts` routed ones a layer where there are any."""
    units = [_unit(None, UnitKind.EMBEDDING, vocab * hidden, 0)]
    for layer in range(layers):
        units.append(_unit(layer, UnitKind.ATTENTION, 2 * hidden * (hidden + kv_width), 4))
        if experts:
            units.append(_unit(layer, UnitKind.ROUTER, hidden * experts, 1))
            weights = 3 * hidden * ffn * experts
            units.append(_unit(layer, UnitKind.EXPERTS, weights, 3 * used, (used, experts)))
        else:
            units.append(_unit(layer, UnitKind.DENSE_FFN, 3 * hidden * ffn, 3))
    units.append(_unit(None, UnitKind.OUTPUT, vocab * hidden, 1))
    return ModelShape(
        architecture="olmoe" if experts else "llama",
        units=tuple(units),
        block_count=layers,
        context_length=32768,
        embedding_length=hidden,
        feed_forward_length=ffn * max(used, 1),
        head_count=hidden // 128,
        vocab_size=vocab,
        expert_count=experts,
        expert_used_count=used,
        kv_bytes_per_layer=(4 * kv_width,) * layers,
        num_parameters=sum(unit.num_weights for unit in units),
        active_parameters=sum(unit.active_weights for unit in units),
        largest_tensor_weights=vocab * hidden,
        weights_by_type=(("Q4_0", sum(unit.num_weights for unit in units)),),
        tied_output=False,
    )


SHAPES = {
    "dense 1B": make_shape(16, 2048, 8192, 512, 128256),
    "dense 7B": make_shape(32, 4096, 11008, 4096, 32000),
    "dense 70B": make_shape(80, 8192, 28672, 1024, 128256),
    "OLMoE 7B, 1B active": make_shape(16, 2048, 1024, 2048, 50304, experts=64, used=8),
    "Qwen3 30B, 3B active": make_shape(48, 2048, 768, 512, 151936, experts=128, used=8),
}
