"""Base class of causal language models: the forms of token mixers, lifted to a stack of blocks."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lin_jax.attention import Layout, TreeArrays, gather_nodes, packed_rows, padded_rows, single_rows
from lin_jax.models.same_bits import logits_of, prefill_rows, verify_nodes
from lin_jax.models.separate_layers import SeparateLayers
from lin_jax.models.stack import LayerStack
from pallas_kernels.precision import upcast


class CausalBlock(Protocol):
    """One layer of a causal model. States have `position`, `[B]` tokens consumed so far."""

    def init_state(self, batch: int, capacity: int, dtype: Any) -> Any:
        """The state of `batch` sequences before their first token."""

    def parallel(self, x: Array, context: Any, layout: Layout, state: Any) -> tuple[Array, Any]:
        """Whole rows `[B, T, E]`; the new state is None if `state` is."""

    def verify(self, x: Array, context: Any, tree: TreeArrays, state: Any) -> tuple[Array, Any]:
        """Tree nodes `[B, N, E]` on top of a state, and the nodes as `commit` needs them, leaves `[B, N, ...]`."""

    def commit(self, state: Any, path: Any, length: Int[Array, " B"]) -> Any:
        """The state after the first `length` nodes of a path, row by row."""


class CausalModel(nnx.Module):
    """A causal language model: embedding, a stack of `CausalBlock`s, and a head.

    A subclass sets `config` (with `dtype`, `hidden_size`, `vocab_size`, `attention`), `embed`, `layers`, `norm` and
    `head` (None where it is the transposed embedding), and says how tokens enter (`begin`).

    Attributes:
        same_bits: whether texts and nodes are computed so that their number changes no bit (`models.same_bits`).
        aux_layers: numbers of layers, in ascending order, whose outputs hidden vectors have behind them, for draft
            heads that read several layers (EAGLE-3, Li et al. 2025); the vectors then have the width W =
            `(1 + len(aux_layers)) E`, else it is E.
        nodes_read_parents: whether a layer's keys and values of a token also depend on its input of the token before.
    """

    config: Any
    embed: nnx.Embed
    layers: LayerStack | SeparateLayers
    norm: Any
    head: nnx.Linear | None
    same_bits: bool = False
    aux_layers: tuple[int, ...] = ()
    nodes_read_parents: bool = False

    @abstractmethod
    def begin(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> tuple[Float[Array, "B T E"], Any]:
        """Inputs of the first block, and the context of positions that every block takes."""

    def finish(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """Inputs of the head, from the outputs of the last block: their norm."""
        return self.norm(x)

    @property
    def hidden_width(self) -> int:
        """Width W of hidden vectors."""
        return self.config.hidden_size * (1 + len(self.aux_layers))

    def outputs(self, x: Float[Array, "B T W"]) -> Float[Array, "B T W"]:
        """Hidden vectors, from what `run` gives: `finish` of the last block's outputs, and those of other layers."""
        size = self.config.hidden_size
        if not self.aux_layers:
            return self.finish(x)
        return jnp.concatenate([self.finish(x[..., :size]), x[..., size:]], axis=-1)

    def logits(self, hidden: Float[Array, "*batch W"]) -> Float[Array, "*batch V"]:
        """Logits in float32 or better."""
        head = self.embed.attend if self.head is None else self.head
        hidden = hidden[..., : self.config.hidden_size]
        return upcast(logits_of(head, hidden) if self.same_bits else head(hidden))

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        mask: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of the next token at every position; arguments as in `hidden`."""
        return self.logits(self.hidden(tokens, segment_ids, mask=mask))

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        mask: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T W"]:
        """Hidden vectors at every position, as the head reads them, with those of `aux_layers` behind them.

        Args:
            tokens: `[B, T]`.
            segment_ids: `[B, T]` which document a token belongs to, as in `layout.packed_rows`.
            mask: `[B, T]` instead of documents: nonzero where a token may be attended to, as in `layout.masked_rows`.
        """
        layout = single_rows(tokens.shape, mask) if segment_ids is None else packed_rows(segment_ids)
        return self._parallel(tokens, layout, None)[0]

    def init_state(self, batch: int, capacity: int = 0) -> Any:
        """The state of `batch` sequences before their first token, every leaf with a leading layer axis.

        Where layers have mixers of several kinds, it is a `ByKind`, whose leaves have an axis of each kind's layers.
        `capacity` is the longest sequence that a growing state (softmax) must hold; constant-size states ignore it.
        """
        dtype = jnp.dtype(self.config.dtype)
        return self.layers.stacked(lambda block: block.init_state(batch, capacity, dtype))

    def prefill(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], state: Any
    ) -> tuple[Float[Array, "B T W"], Any]:
        """Consumes the first `lengths` tokens of each row: hidden vectors at every position, and the state after."""

        def read(tokens: Array, lengths: Array, state: Any) -> tuple[Array, Any]:
            return self._parallel(tokens, padded_rows(lengths, tokens.shape[1], self.position(state)), state)

        return prefill_rows(read, tokens, lengths, state) if self.same_bits else read(tokens, lengths, state)

    def verify(self, tokens: Int[Array, "B N"], tree: TreeArrays, state: Any) -> tuple[Float[Array, "B N W"], Any]:
        """Hidden vectors of a tree's nodes on top of the state, which is not touched, and the nodes for `commit`."""
        if self.same_bits:
            return verify_nodes(self, tokens, tree, state)
        x, context = self.begin(tokens, self.position(state)[:, None] + tree.depth)
        x, nodes = self.run(lambda block, x, layer: block.verify(x, context, tree, layer), x, state)
        return self.outputs(x), nodes

    def commit(self, state: Any, nodes: Any, path: Int[Array, "B P"], length: Int[Array, " B"]) -> Any:
        """The state after the first `length` nodes of `path`, row by row; zero leaves a row as it is."""

        def one(block: CausalBlock, layer_state: Any, layer_nodes: Any) -> Any:
            return block.commit(layer_state, gather_nodes(layer_nodes, path), length)

        return self.layers.side_by_side(one, state, nodes)

    def with_layers(self, numbers: Sequence[int]) -> Self:
        """This model with some of its layers only, in the given order, and with states of as many."""
        model = nnx.clone(self)
        model.aux_layers = ()
        model.layers = self.layers.selected(numbers)
        return model

    def position(self, state: Any) -> Int[Array, " B"]:
        """Number of tokens that each sequence has consumed."""
        return state.position[0]

    def run(self, apply: Callable[[Any, Array, Any], tuple[Array, Any]], x: Array, state: Any) -> tuple[Array, Any]:
        """Runs `x, output = apply(block, x, state of a layer)` over the blocks; behind the last x come `aux_layers`."""
        if not self.aux_layers:
            return self.layers(apply, x, state)

        def one(block: Any, carry: Any, layer: Any) -> tuple[Any, Any]:
            number, x, kept = carry
            x, output = apply(block, x, layer)
            kept = tuple(jnp.where(number == at, x, old) for at, old in zip(self.aux_layers, kept, strict=True))
            return (number + 1, x, kept), output

        begin = jnp.zeros((), jnp.int32), x, (jnp.zeros_like(x),) * len(self.aux_layers)
        (_, x, kept), outputs = self.layers(one, begin, state)
        return jnp.concatenate([x, *kept], axis=-1), outputs

    def _parallel(self, tokens: Array, layout: Layout, state: Any) -> tuple[Array, Any]:
        x, context = self.begin(tokens, layout.positions)
        x, state = self.run(lambda block, x, layer: block.parallel(x, context, layout, layer), x, state)
        return self.outputs(x), state
