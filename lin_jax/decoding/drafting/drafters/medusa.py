"""Medusa heads as a drafter (Cai et al. 2024): one guess per depth, the same for all its nodes."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from lin_jax.decoding.drafting.api import DraftContext, Guesses, Stateless, TreeLevel, best_guesses
from lin_jax.models import MedusaHeads

# Default width; in a union, the ranks of the next drafter begin here.
HEAD_WIDTH = 10


class MedusaDrafter(Stateless):
    """Guesses the most probable tokens of each Medusa head.

    Args:
        heads: the heads, one per depth.
        width: largest number of guesses per head.
    """

    def __init__(self, heads: MedusaHeads, *, width: int = HEAD_WIDTH) -> None:
        self.heads = heads
        self.depth = heads.count
        self.width = min(width, heads.vocab_size)

    def begin(self, context: DraftContext, state: Any) -> tuple[Array, Any]:
        """Shares the hidden vector that the heads read."""
        del state
        # Other layers may stand behind the last, for a path head.
        return context.hidden[:, : self.heads.bias.shape[-1]], None

    def scores(self, shared: Array, carried: Any, level: TreeLevel) -> tuple[Float[Array, "B K V"], Any]:
        """Logits of the depth's head, the same for every node."""
        logits = self._logits(shared, level)
        return jnp.broadcast_to(logits, (*level.tokens.shape, logits.shape[-1])), carried

    def expand(self, shared: Array, carried: Any, level: TreeLevel) -> tuple[Guesses, Any]:
        """Guesses the best tokens of the depth's head, the same for every node."""
        best = best_guesses(self._logits(shared, level), level)
        shape = (*level.tokens.shape, level.ranks)
        log_probs = None if best.log_probs is None else jnp.broadcast_to(best.log_probs, shape)
        return Guesses(jnp.broadcast_to(best.tokens, shape), log_probs), carried

    def _logits(self, hidden: Float[Array, "B E"], level: TreeLevel) -> Float[Array, "B 1 V"]:
        return self.heads(hidden, slice(level.depth, level.depth + 1))
