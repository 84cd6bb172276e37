"""Medusa heads as a drafter: what they guess for a depth is the same for all its nodes."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from lin_jax.decoding.draft import DraftContext, Guesses, Layer, Stateless, best_guesses
from lin_jax.models import MedusaHeads

# In a union, the ranks of the next drafter begin here.
HEAD_WIDTH = 10


class MedusaDrafter(Stateless):
    """The most probable tokens of every Medusa head.

    Args:
        heads: the heads; one for each depth.
        width: how many guesses of each head may be asked for.
    """

    def __init__(self, heads: MedusaHeads, *, width: int = HEAD_WIDTH) -> None:
        self.heads = heads
        self.depth = heads.count
        self.width = min(width, heads.output.shape[-1])

    def begin(self, context: DraftContext, state: Any) -> tuple[Array, Any]:
        """What the heads read."""
        del state
        return context.hidden, None

    def scores(self, shared: Array, carried: Any, layer: Layer) -> tuple[Float[Array, "B K V"], Any]:
        """The logits of the depth's head, for every node."""
        logits = self._logits(shared, layer)
        return jnp.broadcast_to(logits, (*layer.tokens.shape, logits.shape[-1])), carried

    def expand(self, shared: Array, carried: Any, layer: Layer) -> tuple[Guesses, Any]:
        """The best tokens of the depth's head, the same for every node."""
        best = best_guesses(self._logits(shared, layer), layer)
        shape = (*layer.tokens.shape, layer.ranks)
        log_probs = None if best.log_probs is None else jnp.broadcast_to(best.log_probs, shape)
        return Guesses(jnp.broadcast_to(best.tokens, shape), log_probs), carried

    def _logits(self, hidden: Float[Array, "B E"], layer: Layer) -> Float[Array, "B 1 V"]:
        return self.heads(hidden, slice(layer.depth, layer.depth + 1))
