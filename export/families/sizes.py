"""What every decoder's config.json states under the same keys, and the plain decoder that follows from it."""

from __future__ import annotations

from dataclasses import dataclass

from edgephi.export.checkpoint.config import Config
from edgephi.export.spec import DecoderSpec, Rope

MAX_LAYERS, MAX_HEADS, MAX_HEAD_DIM = 1024, 1024, 1024
"""Far beyond any published decoder; a damaged file asks for more and would be built for hours."""


DEFAULT_CONTEXT = 2048
"""Tokens, where LlamaConfig or PhiConfig leaves `max_position_embeddings` out, as the first Llama's did."""
SAME_ACTIVATION = {
    "silu": ("silu", "swish"),
    # all four are tanh's approximation of GELU, with constants that differ in the last digits at most
    "gelu_new": ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh"),
}
"""Names that transformers' activations.py gives to one function, by the name that edgephi's families know."""


@dataclass(frozen=True)
class Sizes:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int


def read_sizes(config: Config) -> Sizes:
    """Read and cross-check the sizes; without `head_dim` the hidden size is shared out among the heads."""
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads", at_most=MAX_HEADS)
    kv_heads = config.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise config.refusal("num_key_value_heads", kv_heads, f"it does not divide the {heads} heads")
    if not config.has("head_dim") and hidden % heads:
        raise config.refusal("hidden_size", hidden, f"it is no multiple of the {heads} heads")
    return Sizes(
        hidden=hidden,
        layers=config.integer("num_hidden_layers", at_most=MAX_LAYERS),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=config.integer("head_dim", hidden // heads, at_most=MAX_HEAD_DIM),
        intermediate=config.integer("intermediate_size"),
        vocabulary=config.integer("vocab_size"),
    )


def expect_activation(config: Config, name: str) -> None:
    """`hidden_act` is absent, or a name of this function."""
    value = config.values.get("hidden_act")
    if value is not None and value not in SAME_ACTIVATION[name]:
        raise config.refusal("hidden_act", value, f"edgephi builds {' or '.join(SAME_ACTIVATION[name])}")


def read_window(config: Config, context_length: int) -> int | None:
    """Tokens a query sees, itself included; None: all of them, as in a window that is as long as the context."""
    window = config.integer("sliding_window", context_length)
    return window if window < context_length else None


def plain_decoder(
    family: str, sizes: Sizes, *, context_length: int, norm_epsilon: float, rope: Rope, tied_embedding: bool
) -> DecoderSpec:
    """A decoder of these sizes as Llama has it: RMSNorm, a gated SiLU, no bias; families replace what differs."""
    return DecoderSpec(
        family=family,
        genai_type=family,
        hidden_size=sizes.hidden,
        layers=sizes.layers,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        intermediate_size=sizes.intermediate,
        vocabulary_size=sizes.vocabulary,
        context_length=context_length,
        norm_epsilon=norm_epsilon,
        rope=rope,
        sliding_window=None,
        tied_embedding=tied_embedding,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
    )
