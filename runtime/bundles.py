"""Which of a layer's tensors are packed side by side, since they see the same activations. Knows only names."""

from collections.abc import Iterator, Sequence

from runtime.architectures.base import Layer

VECTOR_SUFFIXES = ("_norm", "_bias", "_scale")
BUNDLES = (
    ("attn_q", "attn_k", "attn_v"),
    ("ffn_gate", "ffn_up"),
    ("ffn_gate_exps", "ffn_up_exps"),
    ("ffn_gate_shexp", "ffn_up_shexp"),
)
EXPERT_BUNDLES = (("ffn_gate_exps", "ffn_up_exps"), ("ffn_down_exps",))


def is_vector(name: str) -> bool:
    """Whether an attribute of a layer or model is no matrix that activations are multiplied with."""
    return name.endswith(VECTOR_SUFFIXES) or name.startswith("rope_")


def layer_bundles(layer: Layer) -> Iterator[tuple[str, ...]]:
    """Names of a layer's matrices in the order in which a step reads them, those of one bundle together."""
    names: Sequence[str] = [name for name, _ in layer.tensors() if not is_vector(name)]
    while names:
        together = next((bundle for bundle in BUNDLES if names[0] in bundle), (names[0],))
        bundle = tuple(name for name in together if name in names)
        names = [name for name in names if name not in bundle]
        yield bundle
