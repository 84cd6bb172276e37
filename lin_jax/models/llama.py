"""LLaMA (Touvron et al. 2023) over any token mixer: RMS norm, rotary positions, grouped queries, SwiGLU.

Mistral, Qwen2 and Qwen3 are the same model with other options.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lin_jax.attention import AttentionConfig, Layout, TreeArrays, build_mixer
from lin_jax.errors import UserError
from lin_jax.models.causal import CausalModel
from lin_jax.models.rotary import RotaryConfig, rotary_table, rotate
from lin_jax.models.stack import LayerStack

DTYPES = ("float32", "bfloat16", "float64")


@dataclass(frozen=True)
class LlamaConfig:
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
        attention: the token mixer.
        rotary: rotary positions.
        dtype: type of activations: float32, bfloat16 or float64.
        param_dtype: type of parameters.
        remat: recompute each block's activations in the backward pass instead of keeping them.
        unroll: layers per step of the layer loop; more compiles longer and runs faster on small models.
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
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: bool = False
    unroll: int = 1

    def __post_init__(self) -> None:
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in DTYPES:
                raise UserError(f"model.{name} '{getattr(self, name)}' is unknown; choose one of {', '.join(DTYPES)}")
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


def _linear(config: LlamaConfig, size_in: int, size_out: int, rngs: nnx.Rngs, *, bias: bool = False) -> nnx.Linear:
    return nnx.Linear(
        size_in,
        size_out,
        use_bias=bias,
        kernel_init=nnx.initializers.normal(config.initializer_range),
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        rngs=rngs,
    )


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * scale`, in float32 or better (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float, param_dtype: Any) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((size,), param_dtype))

    def __call__(self, x: Float[Array, "*batch E"]) -> Float[Array, "*batch E"]:
        """Normalises the last axis."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (normed * self.scale[...].astype(wide.dtype)).astype(x.dtype)


class Attention(nnx.Module):
    """Projections and rotary positions around a token mixer."""

    def __init__(self, config: LlamaConfig, layer: Array, *, rngs: nnx.Rngs) -> None:
        self.head_dim = config.head_size
        inner, inner_kv = config.num_heads * self.head_dim, config.kv_heads * self.head_dim
        self.query = _linear(config, config.hidden_size, inner, rngs, bias=config.attention_bias)
        self.key = _linear(config, config.hidden_size, inner_kv, rngs, bias=config.attention_bias)
        self.value = _linear(config, config.hidden_size, inner_kv, rngs, bias=config.attention_bias)
        self.out = _linear(config, inner, config.hidden_size, rngs, bias=config.output_bias)
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
        )

    def project(self, x: Float[Array, "B T E"], table: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        """Queries `[B, T, H, D]` and keys `[B, T, K, D]`, rotated, and values `[B, T, K, D]`."""
        queries, keys, values = (
            part(x).reshape(*x.shape[:2], -1, self.head_dim) for part in (self.query, self.key, self.value)
        )
        if self.query_norm is not None and self.key_norm is not None:
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        return rotate(queries, table), rotate(keys, table), values

    def merge(self, outputs: Float[Array, "B T H D"]) -> Float[Array, "B T E"]:
        """Heads back to the residual stream."""
        return self.out(outputs.reshape(*outputs.shape[:2], -1))


class FeedForward(nnx.Module):
    """`down(silu(gate(x)) * up(x))` (Shazeer 2020)."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        self.gate = _linear(config, config.hidden_size, config.intermediate_size, rngs)
        self.up = _linear(config, config.hidden_size, config.intermediate_size, rngs)
        self.down = _linear(config, config.intermediate_size, config.hidden_size, rngs)

    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """Applies the layer to every token."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """One decoder layer, in the forms of its token mixer."""

    def __init__(self, config: LlamaConfig, layer: Array, *, rngs: nnx.Rngs) -> None:
        param_dtype = jnp.dtype(config.param_dtype)
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, param_dtype)
        self.attention = Attention(config, layer, rngs=rngs)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.norm_eps, param_dtype)
        self.feed_forward = FeedForward(config, rngs=rngs)

    def init_state(self, batch: int, capacity: int, dtype: Any) -> Any:
        """The mixer's state before the first token."""
        return self.attention.mixer.init_state(batch, capacity, dtype)

    def parallel(self, x: Array, table: tuple[Array, Array], layout: Layout, state: Any) -> tuple[Array, Any]:
        """Whole rows `[B, T, E]`; the new state is None if `state` is."""
        projected = self.attention.project(self.attention_norm(x), table)
        mixed, state = self.attention.mixer.parallel(*projected, layout, state)
        return self._finish(x, mixed), state

    def verify(self, x: Array, table: tuple[Array, Array], tree: TreeArrays, state: Any) -> tuple[Array, Any]:
        """Tree nodes `[B, N, E]` on top of a state."""
        projected = self.attention.project(self.attention_norm(x), table)
        mixed, nodes = self.attention.mixer.verify(*projected, tree, state)
        return self._finish(x, mixed), nodes

    def commit(self, state: Any, path: Any, length: Int[Array, " B"]) -> Any:
        """The state after the first `length` nodes of a path, row by row."""
        return self.attention.mixer.commit(state, path, length)

    def _finish(self, x: Array, mixed: Array) -> Array:
        x = x + self.attention.merge(mixed)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Llama(CausalModel):
    """A causal language model. `config.vocab_size` must be set."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        if config.vocab_size is None:
            raise UserError("model.vocab_size is not set; give it, or a tokenizer to take it from")
        self.config = config
        dtype, param_dtype = jnp.dtype(config.dtype), jnp.dtype(config.param_dtype)
        self.embed = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            embedding_init=nnx.initializers.normal(config.initializer_range),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.layers = LayerStack(
            lambda rngs, layer: Block(config, layer, rngs=rngs),
            config.num_layers,
            remat=config.remat,
            unroll=config.unroll,
            rngs=rngs,
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, param_dtype)
        self.head = None if config.tie_embeddings else _linear(config, config.hidden_size, config.vocab_size, rngs)

    def begin(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> tuple[Array, tuple[Array, Array]]:
        """Embeddings, and the rotary table of the positions."""
        table = rotary_table(positions, self.config.head_size, self.config.rotary, jnp.dtype(self.config.dtype))
        return self.embed(tokens), table

    def finish(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """The final norm."""
        return self.norm(x)

    def logits(self, hidden: Float[Array, "*batch E"]) -> Float[Array, "*batch V"]:
        """Logits in float32 or better."""
        logits = self.embed.attend(hidden) if self.head is None else self.head(hidden)
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
