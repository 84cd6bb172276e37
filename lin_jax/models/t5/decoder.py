"""T5's decoder: a causal language model, conditioned on an encoder's output."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from lin_jax.attention import QKV, AttentionConfig, Layout, RelativeBias, TreeArrays
from lin_jax.models.causal import CausalModel
from lin_jax.models.stack import LayerStack
from lin_jax.models.t5.config import T5Config
from lin_jax.models.t5.encoder import BiasTable, T5Attention, T5FeedForward, norm


class Places(NamedTuple):
    """Context of positions for every block: the bias between them, and `[B, T]` themselves."""

    bias: RelativeBias
    positions: Int[Array, "B T"]


class DecoderBlock(nnx.Module):
    """One decoder layer: causal attention, attention to the encoder, feed-forward layer."""

    def __init__(self, config: T5Config, layer: Array, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = norm(config)
        self.attention = T5Attention(config, config.decoder_attention, "causal", layer, rngs=rngs)
        self.cross_norm = norm(config)
        self.cross = T5Attention(config, config.cross_attention, "cross", layer, rngs=rngs)
        self.feed_forward_norm = norm(config)
        self.feed_forward = T5FeedForward(config, rngs=rngs)

    def condense(self, encoded: Float[Array, "B S E"], layout: Layout) -> Any:
        """This layer's memory of an encoder's output."""
        keys, values = self.cross.keys_values(encoded)
        return self.cross.mixer.condense(keys, values, layout)

    def init_state(self, batch: int, capacity: int, dtype: Any) -> Any:
        """The causal mixer's state before the first token."""
        return self.attention.mixer.init_state(batch, capacity, dtype)

    def commit(self, state: Any, path: Any, length: Int[Array, " B"]) -> Any:
        """The state after the first `length` nodes of a path, row by row."""
        return self.attention.mixer.commit(state, path, length)

    def project(self, x: Float[Array, "B T E"]) -> QKV:
        """Queries, keys and values `[B, T, H, D]` of the causal attention."""
        return self.attention.project(self.attention_norm(x))

    def finish(self, x: Array, mixed: Array, positions: Int[Array, "B T"], memory: Any) -> Float[Array, "B T E"]:
        """All that follows the causal attention."""
        x = x + self.attention.merge(mixed)
        queries = self.cross.queries(self.cross_norm(x))
        x = x + self.cross.merge(self.cross.mixer.read(queries, positions, memory))
        return x + self.feed_forward(self.feed_forward_norm(x))


@dataclass(frozen=True)
class ReadingBlock:
    """A decoder layer with its own memory of the encoder's output: the forms of a `CausalBlock`."""

    block: DecoderBlock
    memory: Any

    def parallel(self, x: Array, places: Places, layout: Layout, state: Any) -> tuple[Array, Any]:
        """Whole rows `[B, T, E]`; the new state is None if `state` is."""
        mixer = self.block.attention.mixer
        mixed, state = mixer.parallel(self.block.project(x), layout, state, places.bias)
        return self.block.finish(x, mixed, places.positions, self.memory), state

    def verify(self, x: Array, places: Places, tree: TreeArrays, state: Any) -> tuple[Array, Any]:
        """Tree nodes `[B, N, E]` on top of a state."""
        mixer = self.block.attention.mixer
        mixed, nodes = mixer.verify(self.block.project(x), tree, state, places.bias)
        return self.block.finish(x, mixed, places.positions, self.memory), nodes


class Decoder(nnx.Module):
    """A stack of decoder layers with one table of relative biases."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        self.bias = BiasTable(config, bidirectional=False, rngs=rngs)
        self.layers = LayerStack(
            lambda rngs, layer: DecoderBlock(config, layer, rngs=rngs),
            config.decoder_layers,
            compute=config.compute,
            rngs=rngs,
        )
        self.norm = norm(config)

    def condense(self, encoded: Float[Array, "B S E"], layout: Layout) -> Any:
        """All layers' memories of an encoder's output: a tree whose leaves have a leading layer axis."""
        return self.layers.stacked(lambda block: block.condense(encoded, layout))


@dataclass(frozen=True)
class DecoderConfig:
    """The part of a configuration that a generator reads, under the names of every causal model's configuration."""

    vocab_size: int
    hidden_size: int
    attention: AttentionConfig
    dtype: str


class ConditionalDecoder(CausalModel):
    """A decoder as a causal language model of what follows one batch of encoded rows.

    It shares the modules of the T5 it is from. The memories are its own and are read, never written: they are an input
    of every pass, and no part of the state that goes from step to step.

    Args:
        config: of the T5.
        embed: the embedding.
        decoder: the stack.
        head: the head, or None where it is the transposed embedding.
        memories: result of `Decoder.condense`.
        scale: factor of the last norm's output.
    """

    def __init__(
        self,
        config: T5Config,
        embed: nnx.Embed,
        decoder: Decoder,
        head: nnx.Linear | None,
        memories: Any,
        *,
        scale: float = 1.0,
    ) -> None:
        self.config = DecoderConfig(embed.num_embeddings, config.hidden_size, config.decoder_attention, config.dtype)
        self.embed = embed
        self.bias, self.layers, self.norm = decoder.bias, decoder.layers, decoder.norm
        self.head = head
        self.memories = nnx.data(memories)
        self.scale = scale

    @property
    def batch(self) -> int:
        """Number of encoded rows B that it is bound to."""
        return jax.tree.leaves(self.memories)[0].shape[1]

    def begin(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> tuple[Array, Places]:
        """Embeddings, and the places of the tokens."""
        return self.embed(tokens), Places(self.bias(), positions)

    def run(self, apply: Callable[[Any, Array, Any], tuple[Array, Any]], x: Array, state: Any) -> tuple[Array, Any]:
        """Runs `x, output = apply(block, x, layer's state)` over the blocks, each with its own memory."""

        def one(block: DecoderBlock, x: Array, layer: tuple[Any, Any]) -> tuple[Array, Any]:
            return apply(ReadingBlock(block, layer[1]), x, layer[0])

        return self.layers(one, x, (state, self.memories))

    def finish(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """The final norm, scaled for the head."""
        normed = self.norm(x)
        return normed if self.scale == 1 else normed * self.scale
