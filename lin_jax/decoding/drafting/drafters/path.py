"""Path-conditioned head as a drafter: a small recurrent cell runs down the tree."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from lin_jax.decoding.drafting.api import DraftContext, Guesses, Stateless, TreeLevel, best_guesses
from lin_jax.models import PathHead


class PathDrafter(Stateless):
    """Guesses the most probable tokens after each node's own path.

    Args:
        head: the head.
        depth: largest depth of a draft.
        width: largest number of children of a node.
    """

    def __init__(self, head: PathHead, *, depth: int = 8, width: int = 10) -> None:
        self.head = head
        self.depth = depth
        self.width = min(width, head.guessed)

    def begin(self, context: DraftContext, state: Any) -> tuple[None, Float[Array, "B 1 D"]]:
        """Starts the cell from the target's hidden vector."""
        del state
        return None, self.head.begin(context.hidden)[:, None]

    def scores(
        self, shared: None, carried: Float[Array, "B K D"], level: TreeLevel
    ) -> tuple[Float[Array, "B K V"], Float[Array, "B K D"]]:
        """Logits after each node, and the cell's state at it."""
        logits, state = self._own_scores(carried, level)
        return self.head.over_vocabulary(logits), state

    def expand(
        self, shared: None, carried: Float[Array, "B K D"], level: TreeLevel
    ) -> tuple[Guesses, Float[Array, "B K D"]]:
        """Guesses the best tokens after each node; also returns the cell's state at it."""
        logits, state = self._own_scores(carried, level)
        best = best_guesses(logits, level)
        return best._replace(tokens=self.head.named(best.tokens)), state

    def _own_scores(
        self, carried: Float[Array, "B K D"], level: TreeLevel
    ) -> tuple[Float[Array, "B K N"], Float[Array, "B K D"]]:
        """Logits of the tokens that the head can guess, and the cell's state at each node."""
        state = self.head.step(carried, jnp.maximum(level.tokens, 0))
        return self.head.logits(state), state
