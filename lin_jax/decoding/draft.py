"""The contract between whoever guesses tokens and the trees that are grown from the guesses.

A tree is grown from the root down, a layer at a time: the drafter is asked what may follow each node of the layer, and
what it knows of a node (the state of a recurrent head, say) goes down with the node to its children. A drafter that
does not care for the path, one that looks it up in a text, and one that runs a model over it all answer this way.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt

from lin_jax.attention import TreeArrays
from lin_jax.decoding.sampling import largest


class DraftContext(NamedTuple):
    """What a drafter may look at.

    Attributes:
        root: `[B]` the token already chosen, node 0.
        hidden: `[B, E]` the target's hidden vector from which it was chosen.
        recent: `[B, W]` the drafter's `lookback` last tokens, the root last; -1 before the beginning of the text.
        target: the target's recurrent state, which has consumed every token but the root.
    """

    root: Int[Array, " B"]
    hidden: Float[Array, "B E"]
    recent: Int[Array, "B W"]
    target: Any = None


class Layer(NamedTuple):
    """The nodes of one depth that get children.

    Attributes:
        tokens: `[B, K]` their tokens, -1 where there is none.
        depth: their depth, 0 for the root.
        ranks: how many guesses R are wanted for each.
        needed: the ranks that are asked for here or further down; None means all of them.
        scored: whether the guesses' log-probabilities are wanted too.
        above: `[B, n]` tokens of all nodes so far that get children, the layer's own last.
        tree: their depths and ancestry.
    """

    tokens: Int[Array, "B K"]
    depth: int
    ranks: int
    needed: frozenset[int] | None
    scored: bool
    above: Int[Array, "B n"]
    tree: TreeArrays


class Guesses(NamedTuple):
    """What may follow the nodes of a layer, best first.

    Attributes:
        tokens: `[B, K, R]`, -1 where there is no guess.
        log_probs: `[B, K, R]` the drafter's own opinion of each, given the path; None unless asked for. Then no token
            is guessed twice for a node, and what is no guess has minus infinity.
    """

    tokens: Int[Array, "B K R"]
    log_probs: Float[Array, "B K R"] | None


class Draft(NamedTuple):
    """A tree with tokens.

    Attributes:
        tokens: `[B, N]` of the nodes, the root first; -1 where there is no guess.
        parents: `[B, N]` the parent of each node, 0 for the root.
        tree: depths and ancestry, the same for all rows or row by row.
        log_q: `[B, I, V]` if the children were drawn: the distributions from which those of the I nodes with children
            were drawn, one after the other without replacement.
    """

    tokens: Int[Array, "B N"]
    parents: Int[Array, "B N"]
    tree: TreeArrays
    log_q: Float[Array, "B I V"] | None = None


class Drawing(NamedTuple):
    """How children are drawn at random: keys depend on seed, row and position alone.

    Attributes:
        positions: `[B]` absolute position of the token after the root.
        rows: `[B]` number of each sequence.
        seed: of all random numbers.
        temperature: of the drafter's distribution.
    """

    positions: Int[Array, " B"]
    rows: Int[Array, " B"]
    seed: UInt[Array, ""]
    temperature: float


@runtime_checkable
class Drafter(Protocol):
    """Whoever guesses: up to `depth` tokens ahead of the root, up to `width` of them for each node.

    `lookback` is how many of the last tokens it wants to see.
    """

    depth: int
    width: int
    lookback: int

    def init_state(self, batch: int, capacity: int) -> Any:
        """What the drafter remembers of `batch` sequences before their first token; leaves `[L, B, ...]`."""

    def read(self, state: Any, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]) -> Any:
        """The state after the first `lengths` of the tokens, which belong to the prompts."""

    def commit(self, state: Any, path: Int[Array, "B P"], length: Int[Array, " B"]) -> Any:
        """The state after the first `length` tokens of an accepted path, the root first."""

    def begin(self, context: DraftContext, state: Any) -> tuple[Any, Any]:
        """What is the same for all nodes, and what is known above the root, leaves `[B, 1, ...]`."""

    def expand(self, shared: Any, carried: Any, layer: Layer) -> tuple[Guesses, Any]:
        """Guesses for the children of a layer's nodes, and what is known of the nodes, leaves `[B, K, ...]`.

        `carried` is what is known of each node's parent.
        """


@runtime_checkable
class ScoringDrafter(Drafter, Protocol):
    """A drafter with a distribution over the whole vocabulary, from which children can be drawn."""

    def scores(self, shared: Any, carried: Any, layer: Layer) -> tuple[Float[Array, "B K V"], Any]:
        """Logits of the tokens after each node of the layer; the rest as in `expand`."""


class Stateless(nnx.Module):
    """A drafter that remembers nothing between steps."""

    lookback = 0

    def init_state(self, batch: int, capacity: int) -> Any:
        """Nothing."""
        del batch, capacity

    def read(self, state: Any, tokens: Array, lengths: Array) -> Any:
        """Nothing."""
        del tokens, lengths
        return state

    def commit(self, state: Any, path: Array, length: Array) -> Any:
        """Nothing."""
        del path, length
        return state


def no_guesses(layer: Layer) -> Guesses:
    """No guess for any node."""
    shape = (*layer.tokens.shape, layer.ranks)
    return Guesses(jnp.full(shape, -1, jnp.int32), jnp.full(shape, -jnp.inf) if layer.scored else None)


def best_guesses(logits: Float[Array, "B K V"], layer: Layer) -> Guesses:
    """The tokens with the largest logits."""
    if layer.ranks == 1 and not layer.scored:
        return Guesses(largest(logits)[..., None], None)
    best, tokens = jax.lax.top_k(logits, layer.ranks)
    log_probs = best - jax.nn.logsumexp(logits, axis=-1, keepdims=True) if layer.scored else None
    return Guesses(tokens.astype(jnp.int32), log_probs)
