"""T5 (Raffel et al. 2020) over any token mixers: a text-to-text model, and a classifier on the same trunk."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lin_jax.attention import single_rows
from lin_jax.models.layers import embedding, linear
from lin_jax.models.logical_axes import EMBED, VOCABULARY
from lin_jax.models.t5.config import T5Config
from lin_jax.models.t5.decoder import ConditionalDecoder, Decoder
from lin_jax.models.t5.encoder import Encoder, projection
from pallas_kernels.precision import upcast


class T5Trunk(nnx.Module):
    """Embedding, encoder and decoder. `config.vocab_size` must be set."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed = embedding(config, config.vocab_size, config.hidden_size, config.initializer_factor, rngs)
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def encode(self, tokens: Int[Array, "B S"], mask: Int[Array, "B S"] | None = None) -> Float[Array, "B S E"]:
        """Hidden vectors of the encoder.

        Args:
            tokens: `[B, S]`.
            mask: `[B, S]` nonzero where a token may be attended to; None means everywhere. Positions count whole rows.
        """
        return self.encoder(self.embed(tokens), single_rows(tokens.shape, mask))

    def decoder_inputs(self, labels: Int[Array, "B T"]) -> Int[Array, "B T"]:
        """Inputs of the decoder that predicts labels: these, one place later; negative ones become padding."""
        shifted = jnp.pad(labels, ((0, 0), (1, 0)), constant_values=self.config.decoder_start_token)[:, :-1]
        return jnp.where(shifted < 0, self.config.pad_token, shifted)

    def _condition(
        self, tokens: Array, mask: Array | None, head: nnx.Linear | None = None, scale: float = 1.0
    ) -> ConditionalDecoder:
        memories = self.decoder.condense(self.encode(tokens, mask), single_rows(tokens.shape, mask))
        return ConditionalDecoder(self.config, self.embed, self.decoder, head, memories, scale=scale)


class T5(T5Trunk):
    """A text-to-text model."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs=rngs)
        size, vocabulary, axes = config.hidden_size, self.embed.num_embeddings, (EMBED, VOCABULARY)
        self.head = None if config.tie_embeddings else projection(config, size, vocabulary, 1.0, axes, rngs)

    def condition(self, tokens: Int[Array, "B S"], mask: Int[Array, "B S"] | None = None) -> ConditionalDecoder:
        """The causal language model of what follows these rows, row by row; arguments as in `encode`.

        It decodes in a `Generator`, from prompts that begin with `config.decoder_start_token`.
        """
        scale = self.config.hidden_size**-0.5 if self.head is None else 1.0
        return self._condition(tokens, mask, self.head, scale)

    def __call__(
        self, tokens: Int[Array, "B S"], decoder_tokens: Int[Array, "B T"], mask: Int[Array, "B S"] | None = None
    ) -> Float[Array, "B T V"]:
        """Logits after every decoder token; arguments as in `encode`."""
        return self.condition(tokens, mask)(decoder_tokens)


class T5Classifier(T5Trunk):
    """Classes of texts: the decoder reads the text once more, and a head its vector at the last end token."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs=rngs)
        self.dense = _dense(config, config.hidden_size, rngs)
        self.out = _dense(config, config.num_labels, rngs)

    def __call__(self, tokens: Int[Array, "B S"], mask: Int[Array, "B S"] | None = None) -> Float[Array, "B L"]:
        """Logits of the classes; arguments as in `encode`.

        Where a row has no end token, its last token that may be attended to stands for it.
        """
        hidden = self._condition(tokens, mask).hidden(self.decoder_inputs(tokens))
        order = jnp.arange(1, tokens.shape[1] + 1)
        ends = tokens == self.config.end_token
        real = jnp.ones_like(ends) if mask is None else mask != 0
        chosen = jnp.where(jnp.any(ends, axis=1, keepdims=True), ends, real)
        last = jnp.argmax(jnp.where(chosen, order, 0), axis=1)
        summary = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        logits = self.out(jnp.tanh(self.dense(summary)))
        return upcast(logits)


def _dense(config: T5Config, size_out: int, rngs: nnx.Rngs) -> nnx.Linear:
    size = config.hidden_size
    return linear(config, size, size_out, config.initializer_factor * size**-0.5, rngs, axes=(EMBED, None))
