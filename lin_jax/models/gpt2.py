"""GPT-2 (Radford et al. 2019) over any token mixer: learnt positions, layer norm before each part, tanh-GELU."""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lin_jax.attention import QKV, AttentionConfig, build_mixer
from lin_jax.errors import UserError
from lin_jax.models.causal import CausalModel
from lin_jax.models.compute import ComputeConfig
from lin_jax.models.layers import LayerNorm, embedding, linear
from lin_jax.models.logical_axes import EMBED, HEADS, MLP, VOCABULARY, Axes
from lin_jax.models.mixed_stack import layer_stack
from lin_jax.models.prenorm_block import PreNormBlock
from pallas_kernels.precision import upcast


@dataclass(frozen=True)
class Gpt2Config(ComputeConfig):
    """Sizes and options of a GPT-2.

    Attributes:
        vocab_size: entries of the vocabulary; None takes the tokenizer's.
        hidden_size: width E of the residual stream.
        intermediate_size: width of the feed-forward layer; None means four times hidden_size.
        num_layers: decoder blocks.
        num_heads: heads H.
        max_positions: learnt positions, and so the most tokens of a text.
        norm_eps: epsilon of the layer norms.
        tie_embeddings: whether the head is the transposed embedding.
        initializer_range: standard deviation of the initial weights.
        num_labels: classes of a classifier.
        attention: the token mixer, of all layers or of each.
    """

    vocab_size: int | None = None
    hidden_size: int = 256
    intermediate_size: int | None = None
    num_layers: int = 4
    num_heads: int = 8
    max_positions: int = 1024
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    initializer_range: float = 0.02
    num_labels: int = 2
    attention: AttentionConfig = field(default_factory=AttentionConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "attention", AttentionConfig.of(self.attention))
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"model.hidden_size {self.hidden_size} is not a multiple of model.num_heads {self.num_heads}; "
                "change one of them"
            )
        if self.max_positions < 1:
            raise UserError(f"model.max_positions is {self.max_positions}; give a positive number")

    @property
    def inner_size(self) -> int:
        """Width of the feed-forward layer."""
        return self.intermediate_size or 4 * self.hidden_size

    @property
    def head_size(self) -> int:
        """Size D of a head."""
        return self.hidden_size // self.num_heads


def _linear(
    config: Gpt2Config, size_in: int, size_out: int, axes: Axes, rngs: nnx.Rngs, *, bias: bool = True
) -> nnx.Linear:
    return linear(config, size_in, size_out, config.initializer_range, rngs, bias=bias, axes=axes)


class Gpt2Attention(nnx.Module):
    """Projections around a token mixer; queries, keys and values come from one matrix."""

    def __init__(self, config: Gpt2Config, layer: Array, *, rngs: nnx.Rngs) -> None:
        self.heads = config.num_heads
        # Queries, keys and values in one matrix: a cut through all of its columns would not cut between heads.
        self.qkv = _linear(config, config.hidden_size, 3 * config.hidden_size, (EMBED, None), rngs)
        self.out = _linear(config, config.hidden_size, config.hidden_size, (HEADS, EMBED), rngs)
        self.mixer = build_mixer(
            config.attention,
            heads=config.num_heads,
            kv_heads=config.num_heads,
            head_dim=config.head_size,
            layer=layer,
            param_dtype=jnp.dtype(config.param_dtype),
            rngs=rngs,
        )

    def project(self, x: Float[Array, "B T E"], context: None) -> QKV:
        """Queries, keys and values `[B, T, H, D]`."""
        together = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1)
        return QKV(together[:, :, 0], together[:, :, 1], together[:, :, 2])

    def merge(self, outputs: Float[Array, "B T H D"]) -> Float[Array, "B T E"]:
        """Heads back to the residual stream."""
        return self.out(outputs.reshape(*outputs.shape[:2], -1))


class Gpt2FeedForward(nnx.Module):
    """`down(gelu(up(x)))`, with the tanh approximation of GELU (Hendrycks and Gimpel 2016)."""

    def __init__(self, config: Gpt2Config, *, rngs: nnx.Rngs) -> None:
        self.up = _linear(config, config.hidden_size, config.inner_size, (EMBED, MLP), rngs)
        self.down = _linear(config, config.inner_size, config.hidden_size, (MLP, EMBED), rngs)

    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """Applies the layer to every token."""
        return self.down(jax.nn.gelu(self.up(x), approximate=True))


class Gpt2Block(PreNormBlock):
    """One decoder layer."""

    def __init__(self, config: Gpt2Config, layer: Array, *, rngs: nnx.Rngs) -> None:
        first, second = (
            LayerNorm(config.hidden_size, config.norm_eps, jnp.dtype(config.param_dtype)) for _ in range(2)
        )
        super().__init__(Gpt2Attention(config, layer, rngs=rngs), Gpt2FeedForward(config, rngs=rngs), (first, second))


class Gpt2(CausalModel):
    """A causal language model. `config.vocab_size` must be set."""

    def __init__(self, config: Gpt2Config, *, rngs: nnx.Rngs) -> None:
        # Each layer's attention in its shortest form: configurations that say the same are the same.
        self.config = replace(config, attention=config.attention.for_layers(config.num_layers))
        self.embed, self.embed_positions = (
            embedding(config, count, config.hidden_size, config.initializer_range, rngs)
            for count in (config.vocab_size, config.max_positions)
        )
        self.layers = layer_stack(config, lambda config, rngs, layer: Gpt2Block(config, layer, rngs=rngs), rngs)
        self.norm = LayerNorm(config.hidden_size, config.norm_eps, jnp.dtype(config.param_dtype))
        size, vocabulary = config.hidden_size, self.embed.num_embeddings
        axes = (EMBED, VOCABULARY)
        self.head = None if config.tie_embeddings else _linear(config, size, vocabulary, axes, rngs, bias=False)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        mask: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T E"]:
        """Hidden vectors at every position; arguments as in `CausalModel.hidden`.

        Raises:
            UserError: rows are longer than the model has positions.
        """
        if tokens.shape[1] > self.config.max_positions:
            raise UserError(
                f"rows have {tokens.shape[1]} tokens, the model has {self.config.max_positions} positions; "
                "give shorter rows, or raise model.max_positions"
            )
        return super().hidden(tokens, segment_ids, mask=mask)

    def begin(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> tuple[Float[Array, "B T E"], None]:
        """Embeddings of tokens and positions.

        Positions past the last one occur in padding, and in drafts that reach past the end of a text.
        """
        positions = jnp.minimum(positions, self.config.max_positions - 1)
        return self.embed(tokens) + self.embed_positions(positions), None


class Gpt2Classifier(nnx.Module):
    """Scores of whole texts, read from the state at each text's last token."""

    def __init__(self, config: Gpt2Config, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.model = Gpt2(replace(config, tie_embeddings=True), rngs=rngs)  # Its head is not used.
        self.score = _linear(config, config.hidden_size, config.num_labels, (EMBED, None), rngs, bias=False)

    def __call__(self, tokens: Int[Array, "B T"], mask: Int[Array, "B T"] | None = None) -> Float[Array, "B C"]:
        """Logits of the classes, in float32 or better.

        Args:
            tokens: `[B, T]`.
            mask: `[B, T]` nonzero at real tokens, as in `CausalModel.hidden`; None means that all are.
        """
        hidden = self.model.hidden(tokens, mask=mask)
        last = tokens.shape[1] - 1
        if mask is None:
            found = hidden[:, last]
        else:
            index = last - jnp.argmax(jnp.flip(mask, axis=1) != 0, axis=1)
            found = jnp.take_along_axis(hidden, index[:, None, None], axis=1)[:, 0]
        logits = self.score(found)
        return upcast(logits)
