"""BERT (Devlin et al. 2019) over any bidirectional token mixer: an encoder, a masked language model, a classifier."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lin_jax.attention import QKV, AttentionConfig, Layout, build_mixer, single_rows
from lin_jax.errors import UserError
from lin_jax.models.compute import ComputeConfig
from lin_jax.models.layers import LayerNorm, embedding, linear
from lin_jax.models.logical_axes import EMBED, HEADS, MLP, Axes
from lin_jax.models.stack import LayerStack
from pallas_kernels.precision import upcast


@dataclass(frozen=True)
class BertConfig(ComputeConfig):
    """Sizes and options of a BERT.

    Attributes:
        vocab_size: entries of the vocabulary; None takes the tokenizer's.
        hidden_size: width E of the residual stream.
        intermediate_size: width of the feed-forward layer.
        num_layers: encoder blocks.
        num_heads: heads H.
        max_positions: longest row.
        types: kinds of tokens, such as first and second sentence.
        norm_eps: epsilon of the layer norms.
        initializer_range: standard deviation of the initial weights.
        attention: the token mixer.
        pad_token: stands where rows have no token.
        num_labels: classes of a classifier.
    """

    vocab_size: int | None = None
    hidden_size: int = 256
    intermediate_size: int = 1024
    num_layers: int = 4
    num_heads: int = 8
    max_positions: int = 512
    types: int = 2
    norm_eps: float = 1e-12
    initializer_range: float = 0.02
    attention: AttentionConfig = field(default_factory=lambda: AttentionConfig("softmax"))
    pad_token: int = 0
    num_labels: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "attention", AttentionConfig.of(self.attention))
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"model.hidden_size {self.hidden_size} is not a multiple of model.num_heads {self.num_heads}"
            )

    @property
    def head_size(self) -> int:
        """Size D of a head."""
        return self.hidden_size // self.num_heads


def _linear(config: BertConfig, size_in: int, size_out: int, axes: Axes, rngs: nnx.Rngs) -> nnx.Linear:
    return linear(config, size_in, size_out, config.initializer_range, rngs, axes=axes)


def _norm(config: BertConfig) -> LayerNorm:
    return LayerNorm(config.hidden_size, config.norm_eps, jnp.dtype(config.param_dtype))


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


class Embeddings(nnx.Module):
    """Sums of word, position and type embeddings, normalised."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs) -> None:
        self.word, self.position, self.type = (
            embedding(config, count, config.hidden_size, config.initializer_range, rngs)
            for count in (config.vocab_size, config.max_positions, config.types)
        )
        self.norm = _norm(config)

    def __call__(self, tokens: Int[Array, "B T"], types: Int[Array, "B T"] | None) -> Float[Array, "B T E"]:
        """Embeds rows, whose positions count from their beginning."""
        length = tokens.shape[1]
        if length > self.position.num_embeddings:
            raise UserError(
                f"a row has {length} tokens, the model has positions for {self.position.num_embeddings}; "
                "give shorter rows, or raise model.max_positions"
            )
        types = jnp.zeros_like(tokens) if types is None else types
        return self.norm(self.word(tokens) + self.type(types) + self.position(jnp.arange(length)))


class BertAttention(nnx.Module):
    """Projections around a token mixer."""

    def __init__(self, config: BertConfig, layer: Array, *, rngs: nnx.Rngs) -> None:
        size = config.hidden_size
        self.head_dim = config.head_size
        self.query, self.key, self.value = (_linear(config, size, size, (EMBED, HEADS), rngs) for _ in range(3))
        self.out = _linear(config, size, size, (HEADS, EMBED), rngs)
        self.mixer = build_mixer(
            config.attention,
            form="bidirectional",
            heads=config.num_heads,
            kv_heads=config.num_heads,
            head_dim=config.head_size,
            layer=layer,
            param_dtype=jnp.dtype(config.param_dtype),
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "B T E"], layout: Layout) -> Float[Array, "B T E"]:
        """Whole rows."""
        heads = (part(x).reshape(*x.shape[:2], -1, self.head_dim) for part in (self.query, self.key, self.value))
        return self.out(self.mixer.bidirectional(QKV(*heads), layout).reshape(x.shape))


class BertBlock(nnx.Module):
    """One layer, with its norms behind the residual sums."""

    def __init__(self, config: BertConfig, layer: Array, *, rngs: nnx.Rngs) -> None:
        self.attention = BertAttention(config, layer, rngs=rngs)
        self.attention_norm = _norm(config)
        self.up = _linear(config, config.hidden_size, config.intermediate_size, (EMBED, MLP), rngs)
        self.down = _linear(config, config.intermediate_size, config.hidden_size, (MLP, EMBED), rngs)
        self.feed_forward_norm = _norm(config)

    def __call__(self, x: Float[Array, "B T E"], layout: Layout) -> Float[Array, "B T E"]:
        """Whole rows."""
        x = self.attention_norm(x + self.attention(x, layout))
        return self.feed_forward_norm(x + self.down(_gelu(self.up(x))))


class Bert(nnx.Module):
    """The encoder. `config.vocab_size` must be set; `pooler` says whether it has one."""

    def __init__(self, config: BertConfig, *, pooler: bool = True, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed = Embeddings(config, rngs=rngs)
        self.layers = LayerStack(
            lambda rngs, layer: BertBlock(config, layer, rngs=rngs),
            config.num_layers,
            compute=config.compute,
            rngs=rngs,
        )
        self.pooler = _linear(config, config.hidden_size, config.hidden_size, (EMBED, None), rngs) if pooler else None

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        mask: Int[Array, "B T"] | None = None,
        types: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T E"]:
        """Hidden vectors of the last layer.

        Args:
            tokens: `[B, T]`.
            mask: `[B, T]` nonzero where a token may be attended to; None means everywhere. Positions count whole rows.
            types: `[B, T]` kind of each token; None means 0.

        Raises:
            UserError: rows are longer than the model has positions.
        """
        layout = single_rows(tokens.shape, mask)
        return self.layers(lambda block, x, _: (block(x, layout), None), self.embed(tokens, types), None)[0]

    def pooled(
        self,
        tokens: Int[Array, "B T"],
        mask: Int[Array, "B T"] | None = None,
        types: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B E"]:
        """`tanh` of a projection of each row's first hidden vector; arguments as in `hidden`.

        Raises:
            UserError: the model has no pooler, or rows are longer than it has positions.
        """
        if self.pooler is None:
            raise UserError("this BERT has no pooler; build it with pooler=True")
        return jnp.tanh(self.pooler(self.hidden(tokens, mask, types)[:, 0]))


class BertMaskedLM(nnx.Module):
    """The encoder with a head for the token at each place: a masked language model."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.bert = Bert(config, pooler=False, rngs=rngs)
        self.transform = _linear(config, config.hidden_size, config.hidden_size, (EMBED, None), rngs)
        self.norm = _norm(config)
        self.bias = nnx.Param(jnp.zeros((self.bert.embed.word.num_embeddings,), jnp.dtype(config.param_dtype)))

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        mask: Int[Array, "B T"] | None = None,
        types: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of every place's own token, in float32 or better; arguments as in `Bert.hidden`."""
        hidden = self.norm(_gelu(self.transform(self.bert.hidden(tokens, mask, types))))
        return upcast(self.bert.embed.word.attend(hidden)) + self.bias[...]


class BertClassifier(nnx.Module):
    """The encoder with a linear head on its pooled vector."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.bert = Bert(config, rngs=rngs)
        self.head = _linear(config, config.hidden_size, config.num_labels, (EMBED, None), rngs)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        mask: Int[Array, "B T"] | None = None,
        types: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B L"]:
        """Logits of the classes, in float32 or better; arguments as in `Bert.hidden`."""
        return upcast(self.head(self.bert.pooled(tokens, mask, types)))
