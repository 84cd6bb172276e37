"""LLaMA (Touvron et al. 2023) over any token mixer: RMS norm, rotary positions, grouped queries, SwiGLU.

Mistral, Qwen2 and Qwen3 are the same model with other options.
"""

from dataclasses import dataclass, field, replace

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lin_jax.attention import QKV, AttentionConfig, build_mixer
from lin_jax.errors import UserError
from lin_jax.models.causal import CausalModel
from lin_jax.models.compute import ComputeConfig
from lin_jax.models.layers import RMSNorm, embedding, linear, silu_product
from lin_jax.models.logical_axes import EMBED, HEADS, KV_HEADS, MLP, VOCABULARY, Axes
from lin_jax.models.mixed_stack import layer_stack
from lin_jax.models.prenorm_block import PreNormBlock
from lin_jax.models.rotary import RotaryConfig, RotaryTurn, computed_once, rotary_table, rotate


@dataclass(frozen=True)
class LlamaConfig(ComputeConfig):
    """Sizes and options of a LLaMA.

    Attributes:
        vocab_size: entries of the vocabulary; None takes the tokenizer's.
        hidden_size: width E of the residual stream.
        intermediate_size: width of the feed-forward layer.
        num_layers: decoder blocks.
        num_heads: query heads H.
        num_kv_heads: key/value heads K; None means as many as query heads.
        head_dim: size of a head; None means hidden_size / num_heads.
        norm_eps: epsilon of the RMS norms.
        attention_bias: whether the projections to queries, keys and values have biases (Qwen2).
        output_bias: whether the projection out of the heads has one.
        query_key_norm: normalise every head's queries and keys before they are rotated (Qwen3).
        tie_embeddings: whether the head is the transposed embedding.
        initializer_range: standard deviation of the initial weights.
        attention: the token mixer, of all layers or of each.
        rotary: rotary positions.
    """

    vocab_size: int | None = None
    hidden_size: int = 256
    intermediate_size: int = 688
    num_layers: int = 4
    num_heads: int = 8
    num_kv_heads: int | None = None
    head_dim: int | None = None
    norm_eps: float = 1e-5
    attention_bias: bool = False
    output_bias: bool = False
    query_key_norm: bool = False
    tie_embeddings: bool = False
    initializer_range: float = 0.02
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    rotary: RotaryConfig = field(default_factory=RotaryConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "attention", AttentionConfig.of(self.attention))
        if self.num_heads % self.kv_heads:
            raise UserError(f"model.num_kv_heads {self.kv_heads} does not divide model.num_heads {self.num_heads}")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise UserError(
                f"model.hidden_size {self.hidden_size} is not a multiple of model.num_heads {self.num_heads}; "
                "give model.head_dim"
            )
        if self.head_size % 2:
            raise UserError(f"model.head_dim is {self.head_size}; rotary positions need an even size")

    @property
    def kv_heads(self) -> int:
        """Key/value heads K."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        """Size D of a head."""
        return self.head_dim or self.hidden_size // self.num_heads


def _linear(
    config: LlamaConfig, size_in: int, size_out: int, axes: Axes, rngs: nnx.Rngs, *, bias: bool = False
) -> nnx.Linear:
    return linear(config, size_in, size_out, config.initializer_range, rngs, bias=bias, axes=axes)


class LlamaAttention(nnx.Module):
    """Projections and rotary positions around a token mixer."""

    def __init__(self, config: LlamaConfig, layer: Array, *, rngs: nnx.Rngs) -> None:
        self.head_dim = config.head_size
        inner, inner_kv = config.num_heads * self.head_dim, config.kv_heads * self.head_dim
        self.query = _linear(config, config.hidden_size, inner, (EMBED, HEADS), rngs, bias=config.attention_bias)
        self.key, self.value = (
            _linear(config, config.hidden_size, inner_kv, (EMBED, KV_HEADS), rngs, bias=config.attention_bias)
            for _ in range(2)
        )
        self.out = _linear(config, inner, config.hidden_size, (HEADS, EMBED), rngs, bias=config.output_bias)
        self.query_norm, self.key_norm = (
            RMSNorm(self.head_dim, config.norm_eps, jnp.dtype(config.param_dtype)) if config.query_key_norm else None
            for _ in range(2)
        )
        self.mixer = build_mixer(
            config.attention,
            heads=config.num_heads,
            kv_heads=config.kv_heads,
            head_dim=self.head_dim,
            layer=layer,
            param_dtype=jnp.dtype(config.param_dtype),
            rngs=rngs,
            turn=RotaryTurn(config.rotary),
        )

    def project(self, x: Float[Array, "B T E"], table: tuple[Array, Array]) -> QKV:
        """Queries `[B, T, H, D]` and keys `[B, T, K, D]`, rotated unless the mixer does, and values `[B, T, K, D]`."""
        queries, keys, values = (
            part(x).reshape(*x.shape[:2], -1, self.head_dim) for part in (self.query, self.key, self.value)
        )
        if self.query_norm is not None and self.key_norm is not None:
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        if getattr(self.mixer, "turn", None) is not None:
            return QKV(queries, keys, values)
        return QKV(rotate(queries, table), rotate(keys, table), values)

    def merge(self, outputs: Float[Array, "B T H D"]) -> Float[Array, "B T E"]:
        """Heads back to the residual stream."""
        return self.out(outputs.reshape(*outputs.shape[:2], -1))


class LlamaFeedForward(nnx.Module):
    """`down(silu(gate(x)) * up(x))` (Shazeer 2020)."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        size, inner = config.hidden_size, config.intermediate_size
        self.gate, self.up = (_linear(config, size, inner, (EMBED, MLP), rngs) for _ in range(2))
        self.down = _linear(config, inner, size, (MLP, EMBED), rngs)

    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """Applies the layer to every token."""
        return self.down(silu_product(self.gate(x), self.up(x)))


class LlamaBlock(PreNormBlock):
    """One decoder layer."""

    def __init__(self, config: LlamaConfig, layer: Array, *, rngs: nnx.Rngs) -> None:
        first, second = (RMSNorm(config.hidden_size, config.norm_eps, jnp.dtype(config.param_dtype)) for _ in range(2))
        super().__init__(LlamaAttention(config, layer, rngs=rngs), LlamaFeedForward(config, rngs=rngs), (first, second))


class Llama(CausalModel):
    """A causal language model. `config.vocab_size` must be set."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        # Each layer's attention in its shortest form: configurations that say the same are the same.
        self.config = replace(config, attention=config.attention.for_layers(config.num_layers))
        self.embed = embedding(config, config.vocab_size, config.hidden_size, config.initializer_range, rngs)
        self.layers = layer_stack(config, lambda config, rngs, layer: LlamaBlock(config, layer, rngs=rngs), rngs)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, jnp.dtype(config.param_dtype))
        size, vocabulary = config.hidden_size, self.embed.num_embeddings
        self.head = None if config.tie_embeddings else _linear(config, size, vocabulary, (EMBED, VOCABULARY), rngs)

    def begin(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> tuple[Array, tuple[Array, Array]]:
        """Embeddings, and the rotary table of the positions."""
        table = rotary_table(positions, self.config.head_size, self.config.rotary, jnp.dtype(self.config.dtype))
        x = self.embed(tokens)
        return x, computed_once(table, x)
