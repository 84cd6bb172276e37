"""The contract that every token mixer keeps: forms that agree with each other.

A causal mixer has three: *parallel* takes a whole sequence at once, optionally from a state; *verify* scores the nodes
of a draft tree against a state without touching it; *commit* folds an accepted path into the state. Plain decoding is
verify and commit with one node. A bidirectional mixer has one form, for encoders. A cross mixer has two: *condense*
turns what an encoder wrote into a memory, *read* answers any number of queries from it, alone or in a tree.

Queries are `[B, T, H, D]`, keys `[B, T, K, D]`, values `[B, T, K, E]`, with H a multiple of K.
"""

from typing import Any, Literal, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, Int

from lin_jax.attention.bias import RelativeBias
from lin_jax.attention.layout import Layout
from pallas_kernels.types import QKV, TreeArrays

MixerState = Any


class Turn(Protocol):
    """Rotary positions, for mixers that turn queries and keys themselves. Hashable: it is a part of programs."""

    def __call__(
        self, vectors: Float[Array, "B *tokens_heads D"], positions: Int[Array, "#B *tokens"]
    ) -> Float[Array, "B *tokens_heads D"]:
        """Vectors turned by the positions of their tokens; axes behind those of positions are heads."""

    def back(
        self, vectors: Float[Array, "B *tokens_heads D"], positions: Int[Array, "#B *tokens"]
    ) -> Float[Array, "B *tokens_heads D"]:
        """Vectors as they were before they were turned."""


Form = Literal["causal", "bidirectional", "cross"]


def gather_nodes(nodes: Any, path: Int[Array, "B P"]) -> Any:
    """Gathers the nodes at `path`, row by row, from a tree of arrays `[B, N, ...]`."""

    def take(part: Array) -> Array:
        return jax.numpy.take_along_axis(part, path.reshape(*path.shape, *(1,) * (part.ndim - 2)), axis=1)

    return jax.tree.map(take, nodes)


@runtime_checkable
class TokenMixer(Protocol):
    """A causal token mixer."""

    def init_state(self, batch: int, capacity: int, dtype: Any) -> MixerState:
        """The state of `batch` sequences before their first token; `capacity` bounds the tokens a cache must hold."""

    def parallel(
        self,
        qkv: QKV,
        layout: Layout,
        state: MixerState | None = None,
        bias: RelativeBias | None = None,
    ) -> tuple[Array, MixerState | None]:
        """Outputs `[B, T, H, E]` of a whole sequence and, if a state was given, the state after it."""

    def verify(
        self,
        qkv: QKV,
        tree: TreeArrays,
        state: MixerState,
        bias: RelativeBias | None = None,
    ) -> tuple[Array, Any]:
        """Outputs `[B, N, H, E]` of the nodes of a tree on top of the state, and the nodes as commit needs them."""

    def commit(self, state: MixerState, path: Any, length: Int[Array, " B"]) -> MixerState:
        """The state after the first `length` nodes of `path`, row by row; zero leaves a row as it is."""


@runtime_checkable
class BidirectionalMixer(Protocol):
    """A token mixer of an encoder."""

    def bidirectional(self, qkv: QKV, layout: Layout, bias: RelativeBias | None = None) -> Array:
        """Outputs `[B, T, H, E]`; no output of a present token depends on one that is not present."""


@runtime_checkable
class CrossMixer(Protocol):
    """A mixer by which a decoder reads an encoder's output."""

    def condense(self, keys: Array, values: Array, layout: Layout) -> Any:
        """The memory that queries read, from an encoder's keys `[B, S, K, D]` and values `[B, S, K, E]`."""

    def read(self, queries: Array, positions: Int[Array, "B T"], memory: Any) -> Array:
        """Outputs `[B, T, H, E]` of queries at the given positions of the decoder."""
