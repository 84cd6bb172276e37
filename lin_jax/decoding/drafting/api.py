"""Protocol between drafters, which guess tokens, and draft trees, which are grown from the guesses.

A tree is grown from the root down, a level at a time: the drafter guesses the children of each node of the level, and
its state at a node (the state of a recurrent head, say) is carried down to the node's children. Drafters that ignore
the path, that look it up in a text and that run a model over it all fit this protocol.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt

from lin_jax.attention import TreeArrays
from lin_jax.decoding.engine.sampling import argmax


class DraftContext(NamedTuple):
    """Input of a drafter at one step.

    Attributes:
        root: `[B]` the token already chosen, node 0.
        hidden: `[B, W]` the target's hidden vector from which the root was chosen, with those of `aux_layers` behind.
        recent: `[B, W]` last tokens (`lookback` of them), the root last; -1 before the beginning of the text.
        target: the target's recurrent state, which has consumed every token but the root.
    """

    root: Int[Array, " B"]
    hidden: Float[Array, "B W"]
    recent: Int[Array, "B W"]
    target: Any = None


class TreeLevel(NamedTuple):
    """Nodes of one depth that get children.

    Attributes:
        tokens: `[B, K]` their tokens, -1 where there is none.
        depth: their depth, 0 for the root.
        ranks: number of guesses R wanted for each.
        needed: ranks that are used here or further down; None means all of them.
        scored: whether the guesses' log-probabilities are wanted too.
        above: `[B, n]` tokens of all nodes so far that get children, this level's own last.
        tree: depths and ancestry of the nodes in `above`.
    """

    tokens: Int[Array, "B K"]
    depth: int
    ranks: int
    needed: frozenset[int] | None
    scored: bool
    above: Int[Array, "B n"]
    tree: TreeArrays


class Guesses(NamedTuple):
    """Guessed children of the nodes of a level, best first.

    Attributes:
        tokens: `[B, K, R]` token ids, -1 where there is no guess.
        log_probs: `[B, K, R]` the drafter's log-probability of each, given the path; None unless asked for. If given,
            no token is guessed twice for a node, and missing guesses have minus infinity.
    """

    tokens: Int[Array, "B K R"]
    log_probs: Float[Array, "B K R"] | None


class Draft(NamedTuple):
    """Draft tree filled with tokens.

    Attributes:
        tokens: `[B, N]` token of each node, the root first; -1 where there is no guess.
        parents: `[B, N]` parent of each node, 0 for the root.
        tree: depths and ancestry, the same for all rows or row by row.
        log_q: `[B, I, V]` if the children were drawn: log-probabilities from which those of the I internal nodes were
            drawn, one after the other without replacement; else None.
    """

    tokens: Int[Array, "B N"]
    parents: Int[Array, "B N"]
    tree: TreeArrays
    log_q: Float[Array, "B I V"] | None = None


class Drawing(NamedTuple):
    """Options for drawing children at random; the keys depend on seed, row and position alone.

    Attributes:
        positions: `[B]` absolute position of the token after the root.
        rows: `[B]` index of each sequence among all that are decoded.
        seed: seed of all random numbers.
        temperature: temperature of the drafter's distribution.
    """

    positions: Int[Array, " B"]
    rows: Int[Array, " B"]
    seed: UInt[Array, ""]
    temperature: float


@runtime_checkable
class Drafter(Protocol):
    """Guesses tokens ahead of the root.

    Attributes:
        depth: largest depth of a guess.
        width: largest number of guesses per node.
        lookback: number W of last tokens that it reads.
    """

    depth: int
    width: int
    lookback: int

    def init_state(self, batch: int, capacity: int) -> Any:
        """State of `batch` sequences before their first token; leaves `[L, B, ...]`."""

    def prefill(self, state: Any, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]) -> Any:
        """State after the first `lengths` tokens of each row, a chunk of the prompts."""

    def commit(self, state: Any, path: Int[Array, "B P"], length: Int[Array, " B"]) -> Any:
        """State after the first `length` tokens of an accepted path, the root first."""

    def begin(self, context: DraftContext, state: Any) -> tuple[Any, Any]:
        """Prepares one step: data shared by all nodes, and the carried state above the root, leaves `[B, 1, ...]`."""

    def expand(self, shared: Any, carried: Any, level: TreeLevel) -> tuple[Guesses, Any]:
        """Guesses the children of a level's nodes.

        Args:
            shared: data shared by all nodes, from `begin`.
            carried: state at each node's parent, leaves `[B, K, ...]`.
            level: the nodes.

        Returns:
            The guesses, and the state at each node, leaves `[B, K, ...]`.
        """


@runtime_checkable
class ScoringDrafter(Drafter, Protocol):
    """Drafter with a distribution over the whole vocabulary, from which children can be drawn."""

    def scores(self, shared: Any, carried: Any, level: TreeLevel) -> tuple[Float[Array, "B K V"], Any]:
        """Logits of the tokens after each node of the level; the rest as in `expand`."""


class Stateless(nnx.Module):
    """Drafter without a state between steps."""

    lookback = 0

    def init_state(self, batch: int, capacity: int) -> Any:
        """Empty state."""
        del batch, capacity

    def prefill(self, state: Any, tokens: Array, lengths: Array) -> Any:
        """Leaves the empty state as it is."""
        del tokens, lengths
        return state

    def commit(self, state: Any, path: Array, length: Array) -> Any:
        """Leaves the empty state as it is."""
        del path, length
        return state


def no_guesses(level: TreeLevel) -> Guesses:
    """Guesses that are missing for every node."""
    shape = (*level.tokens.shape, level.ranks)
    return Guesses(jnp.full(shape, -1, jnp.int32), jnp.full(shape, -jnp.inf) if level.scored else None)


def best_guesses(logits: Float[Array, "B K V"], level: TreeLevel) -> Guesses:
    """Tokens with the largest logits, best first."""
    if level.ranks == 1 and not level.scored:
        return Guesses(argmax(logits)[..., None], None)
    best, tokens = jax.lax.top_k(logits, level.ranks)
    log_probs = best - jax.nn.logsumexp(logits, axis=-1, keepdims=True) if level.scored else None
    return Guesses(tokens.astype(jnp.int32), log_probs)
