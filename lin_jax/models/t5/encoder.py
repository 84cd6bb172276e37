"""T5's encoder (Raffel et al. 2020) over any bidirectional token mixer, and the layers that its decoder shares."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lin_jax.attention import QKV, AttentionConfig, Layout, RelativeBias, build_mixer
from lin_jax.attention.protocols import Form
from lin_jax.models.layers import RMSNorm, linear
from lin_jax.models.logical_axes import EMBED, HEADS, MLP, Axes
from lin_jax.models.stack import LayerStack
from lin_jax.models.t5.config import CONVENTIONS, T5Config


def projection(
    config: T5Config, size_in: int, size_out: int, deviation: float, axes: Axes, rngs: nnx.Rngs
) -> nnx.Linear:
    """A linear layer without bias, with initial weights of the given standard deviation times the model's factor."""
    return linear(config, size_in, size_out, config.initializer_factor * deviation, rngs, bias=False, axes=axes)


def norm(config: T5Config) -> RMSNorm:
    """A norm of the residual stream."""
    return RMSNorm(config.hidden_size, config.norm_eps, jnp.dtype(config.param_dtype))


class T5Attention(nnx.Module):
    """Projections around a token mixer of any form."""

    def __init__(
        self, config: T5Config, attention: AttentionConfig, form: Form, layer: Array, *, rngs: nnx.Rngs
    ) -> None:
        size, inner = config.hidden_size, config.inner_size
        self.head_dim = config.head_dim
        # Queries begin small instead of being divided by the root of the head's size.
        self.query = projection(config, size, inner, (size * config.head_dim) ** -0.5, (EMBED, HEADS), rngs)
        self.key = projection(config, size, inner, size**-0.5, (EMBED, HEADS), rngs)
        self.value = projection(config, size, inner, size**-0.5, (EMBED, HEADS), rngs)
        self.out = projection(config, inner, size, inner**-0.5, (HEADS, EMBED), rngs)
        self.mixer = build_mixer(
            attention,
            form=form,
            heads=config.num_heads,
            kv_heads=config.num_heads,
            head_dim=config.head_dim,
            conventions=CONVENTIONS,
            layer=layer,
            param_dtype=jnp.dtype(config.param_dtype),
            rngs=rngs,
        )

    def queries(self, x: Float[Array, "B T E"]) -> Float[Array, "B T H D"]:
        """Queries of the tokens that read."""
        return self._split(self.query(x))

    def keys_values(self, x: Float[Array, "B S E"]) -> tuple[Float[Array, "B S H D"], Float[Array, "B S H D"]]:
        """Keys and values of the tokens that are read."""
        return self._split(self.key(x)), self._split(self.value(x))

    def project(self, x: Float[Array, "B T E"]) -> QKV:
        """Queries, keys and values of tokens that read each other."""
        return QKV(self.queries(x), *self.keys_values(x))

    def merge(self, outputs: Float[Array, "B T H D"]) -> Float[Array, "B T E"]:
        """Heads back to the residual stream."""
        return self.out(outputs.reshape(*outputs.shape[:2], -1))

    def _split(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], -1, self.head_dim)


class T5FeedForward(nnx.Module):
    """`down(relu(up(x)))`, or `down(gelu(gate(x)) * up(x))` (Shazeer 2020)."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        size, inner = config.hidden_size, config.intermediate_size
        gated = config.feed_forward == "gated-gelu"
        self.gate = projection(config, size, inner, size**-0.5, (EMBED, MLP), rngs) if gated else None
        self.up = projection(config, size, inner, size**-0.5, (EMBED, MLP), rngs)
        self.down = projection(config, inner, size, inner**-0.5, (MLP, EMBED), rngs)

    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """Applies the layer to every token."""
        if self.gate is None:
            return self.down(jax.nn.relu(self.up(x)))
        return self.down(jax.nn.gelu(self.gate(x), approximate=True) * self.up(x))


class BiasTable(nnx.Module):
    """The relative biases `[N, H]` that all layers of a stack share."""

    def __init__(self, config: T5Config, *, bidirectional: bool, rngs: nnx.Rngs) -> None:
        self.bidirectional = bidirectional
        self.max_distance = config.max_distance
        draw = nnx.initializers.normal(config.initializer_factor * config.hidden_size**-0.5)
        shape = (config.buckets, config.num_heads)
        self.table = nnx.Param(draw(rngs.params(), shape, jnp.dtype(config.param_dtype)))

    def __call__(self) -> RelativeBias:
        """The relative bias as mixers take it."""
        return RelativeBias(self.table[...], self.bidirectional, self.max_distance)


class EncoderBlock(nnx.Module):
    """One encoder layer."""

    def __init__(self, config: T5Config, layer: Array, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = norm(config)
        self.attention = T5Attention(config, config.encoder_attention, "bidirectional", layer, rngs=rngs)
        self.feed_forward_norm = norm(config)
        self.feed_forward = T5FeedForward(config, rngs=rngs)

    def __call__(self, x: Float[Array, "B T E"], layout: Layout, bias: RelativeBias) -> Float[Array, "B T E"]:
        """Whole rows."""
        qkv = self.attention.project(self.attention_norm(x))
        x = x + self.attention.merge(self.attention.mixer.bidirectional(qkv, layout, bias))
        return x + self.feed_forward(self.feed_forward_norm(x))


class Encoder(nnx.Module):
    """A stack of encoder layers with one table of relative biases."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        self.bias = BiasTable(config, bidirectional=True, rngs=rngs)
        self.layers = LayerStack(
            lambda rngs, layer: EncoderBlock(config, layer, rngs=rngs),
            config.num_layers,
            compute=config.compute,
            rngs=rngs,
        )
        self.norm = norm(config)

    def __call__(self, x: Float[Array, "B T E"], layout: Layout) -> Float[Array, "B T E"]:
        """Hidden vectors of embedded rows."""
        bias = self.bias()
        x, _ = self.layers(lambda block, x, _: (block(x, layout, bias), None), x, None)
        return self.norm(x)
