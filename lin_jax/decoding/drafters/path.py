"""A path-conditioned head as a drafter: a small recurrent cell goes down the tree."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from lin_jax.decoding.draft import DraftContext, Guesses, Layer, Stateless, best_guesses
from lin_jax.models import PathHead


class PathDrafter(Stateless):
    """The most probable tokens after each node's own path.

    Args:
        head: the head.
        depth: how deep to draft.
        width: how many children a node may be given.
    """

    def __init__(self, head: PathHead, *, depth: int = 8, width: int = 10) -> None:
        self.head = head
        self.depth = depth
        self.width = min(width, head.vocab_size)

    def begin(self, context: DraftContext, state: Any) -> tuple[None, Float[Array, "B 1 D"]]:
        """The cell's first state."""
        del state
        return None, self.head.begin(context.hidden)[:, None]

    def scores(
        self, shared: None, carried: Float[Array, "B K D"], layer: Layer
    ) -> tuple[Float[Array, "B K V"], Float[Array, "B K D"]]:
        """Logits after each node, and the cell's state there."""
        state = self.head.step(carried, jnp.maximum(layer.tokens, 0))
        return self.head.logits(state), state

    def expand(
        self, shared: None, carried: Float[Array, "B K D"], layer: Layer
    ) -> tuple[Guesses, Float[Array, "B K D"]]:
        """The best tokens after each node, and the cell's state there."""
        logits, state = self.scores(shared, carried, layer)
        return best_guesses(logits, layer), state
