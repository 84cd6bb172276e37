"""Arrays that operations and models hand to each other: queries, keys and values, draft trees, decode states."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int


class QKV(NamedTuple):
    """Queries, keys and values of the same tokens, in heads.

    Attributes:
        queries: `[B, T, H, D]`.
        keys: `[B, T, K, D]`, H a multiple of K.
        values: `[B, T, K, E]`.
    """

    queries: Float[Array, "B T H D"]
    keys: Float[Array, "B T K D"]
    values: Float[Array, "B T K E"]


class Nodes(NamedTuple):
    """Keys and values of a draft tree's nodes (or of a path through it), as a state keeps them.

    Attributes:
        keys: `[B, N, K, D]`.
        values: `[B, N, K, E]`.
    """

    keys: Float[Array, "*layers B N K D"]
    values: Float[Array, "*layers B N K E"]


class TreeArrays(NamedTuple):
    """Depths and ancestry of the `N` nodes of a draft tree, the same for all rows or row by row; node 0 is the root.

    Attributes:
        depth: `[N]` or `[B, N]`, 0 for the root.
        ancestors: `[N, N]` or `[B, N, N]`, whether node j is node i or above it, at `[i, j]`.
    """

    depth: Int[Array, "*B N"]
    ancestors: Bool[Array, "*B N N"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AugmentedState:
    """Decode state of augmented linear attention for `B` sequences; its size does not grow with their length.

    Attributes:
        memory: `[B, K, M, E]` `sum phi(k) v^T` over finished groups (with the normaliser behind the values, if there is
            one), float32 or better; None without a linear branch.
        keys: `[B, G, K, D]` keys of the unfinished group as they are scored, position p in slot `p % G`.
        values: `[B, G, K, E]` its values.
        window: `[B, W-1, K, E]` the last values, newest last; None without a convolution.
        position: `[B]` tokens consumed so far.
    """

    memory: Float[Array, "*layers B K M E"] | None
    keys: Float[Array, "*layers B G K D"]
    values: Float[Array, "*layers B G K E"]
    window: Float[Array, "*layers B W_1 K E"] | None
    position: Int[Array, "*layers B"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WindowedState:
    """Decode state of `B` sequences; its size does not grow with their length.

    Attributes:
        memory: `[B, K, M, E]` `sum phi(k) v^T` (with the normaliser behind the values, if there is one) over the tokens
            before the next query's window, decayed up to the last of them; float32 or better.
        keys: `[B, C, K, D]` keys of the window as they are scored, position p in slot `p % C`.
        values: `[B, C, K, E]` its values.
        decays: `[B, C, K]` logarithms of its decay factors, float32 or better; None without decay.
        convolved: `[B, W-1, K, E]` the last values, newest last; None without a convolution.
        position: `[B]` tokens consumed so far.
        sink_keys: `[B, S, K, D]` keys of the first tokens, that of position p in slot p; None without sinks.
        sink_values: `[B, S, K, E]` their values.
    """

    memory: Float[Array, "*layers B K M E"]
    keys: Float[Array, "*layers B C K D"]
    values: Float[Array, "*layers B C K E"]
    decays: Float[Array, "*layers B C K"] | None
    convolved: Float[Array, "*layers B W_1 K E"] | None
    position: Int[Array, "*layers B"]
    sink_keys: Float[Array, "*layers B S K D"] | None = None
    sink_values: Float[Array, "*layers B S K E"] | None = None
