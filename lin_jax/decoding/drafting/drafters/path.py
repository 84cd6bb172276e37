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
        self.width = min(width, head.vocab_size)

    def begin(self, context: DraftContext, state: Any) -> tuple[None, Float[Array, "B 1 D"]]:
        """Starts the cell from the target's hidden vector."""
        del state
        return None, self.head.begin(context.hidden)[:, None]

    def scores(
        self, shared: None, carried: Float[Array, "B K D"], level: TreeLevel
    ) -> tuple[Float[Array, "B K V"], Float[Array, "B K D"]]:
        """Logits after each node, and the cell's state at it."""
        state = self.head.step(carried, jnp.maximum(level.tokens, 0))
        return self.head.logits(state), state

    def expand(
        self, shared: None, carried: Float[Array, "B K D"], level: TreeLevel
    ) -> tuple[Guesses, Float[Array, "B K D"]]:
        """Guesses the best tokens after each node; also returns the cell's state at it."""
        logits, state = self.scores(shared, carried, level)
        return best_guesses(logits, level), state
