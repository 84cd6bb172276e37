"""Sizes and options of a T5."""

from dataclasses import dataclass, field
from typing import Literal

from lin_jax.attention import AttentionConfig, Conventions
from lin_jax.errors import UserError
from lin_jax.models.compute import ComputeConfig, check_choice

FEED_FORWARDS = ("relu", "gated-gelu")

# The published replacement of T5's attention: unit values, the bias beside the weights, one norm over all heads.
CONVENTIONS = Conventions(
    unit=True, unit_values=True, bias="weights", merged_norm=True, softmax_scale="one", relative=True
)


@dataclass(frozen=True)
class T5Config(ComputeConfig):
    """Sizes and options of a T5.

    Attributes:
        vocab_size: entries of the vocabulary; None takes the tokenizer's.
        hidden_size: width E of the residual streams.
        head_dim: size D of a head.
        intermediate_size: width of the feed-forward layers.
        num_layers: encoder blocks.
        num_decoder_layers: decoder blocks; None means as many.
        num_heads: heads H.
        feed_forward: `relu` (T5), or `gated-gelu` (T5 1.1, GELU by tanh).
        buckets: rows of the tables of relative biases.
        max_distance: distances from here on share the last bucket.
        norm_eps: epsilon of the RMS norms.
        tie_embeddings: whether the head is the transposed embedding; what it reads is then scaled by `E^-1/2`.
        initializer_factor: scale of the initial weights; 1 is T5's own.
        encoder_attention: the token mixer of the encoder.
        decoder_attention: the causal token mixer of the decoder.
        cross_attention: the attention by which the decoder reads the encoder.
        pad_token: stands where rows have no token.
        end_token: ends a text; a classifier reads at the last of them.
        decoder_start_token: first token of the decoder's input.
        num_labels: classes of a classifier.
    """

    vocab_size: int | None = None
    hidden_size: int = 256
    head_dim: int = 32
    intermediate_size: int = 1024
    num_layers: int = 4
    num_decoder_layers: int | None = None
    num_heads: int = 8
    feed_forward: Literal["relu", "gated-gelu"] = "relu"
    buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    initializer_factor: float = 1.0
    encoder_attention: AttentionConfig = field(default_factory=AttentionConfig)
    decoder_attention: AttentionConfig = field(default_factory=AttentionConfig)
    cross_attention: AttentionConfig = field(default_factory=lambda: AttentionConfig("softmax"))
    pad_token: int = 0
    end_token: int = 1
    decoder_start_token: int = 0
    num_labels: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("encoder_attention", "decoder_attention", "cross_attention"):
            object.__setattr__(self, name, AttentionConfig.of(getattr(self, name)))
        check_choice(self, "feed_forward", FEED_FORWARDS)
        # Half of the encoder's buckets are for keys after the query, and half of a half for single distances.
        if self.buckets < 4 or self.buckets % 2:
            raise UserError(f"model.buckets is {self.buckets}; give an even number, at least 4")
        if self.max_distance <= self.buckets // 2:
            raise UserError(
                f"model.max_distance is {self.max_distance}; give more than {self.buckets // 2}, "
                f"the distances that {self.buckets} buckets tell apart"
            )

    @property
    def decoder_layers(self) -> int:
        """Blocks of the decoder."""
        return self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers

    @property
    def inner_size(self) -> int:
        """Width `H D` of all heads together."""
        return self.num_heads * self.head_dim
