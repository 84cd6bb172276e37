"""Several drafters as one, which guesses the likeliest tokens of all."""

from typing import Any

import jax.numpy as jnp

from lin_jax.decoding.drafting.api import Guesses, TreeLevel
from lin_jax.decoding.drafting.drafters.union import UnionDrafter


class LikeliestDrafter(UnionDrafter):
    """Sorts the guesses of several drafters by the probability that each gives its own; of equal tokens one is kept.

    A chain then takes the copied token where the match is long, and the head's where the head is surer.
    """

    def expand(self, shared: Any, carried: Any, level: TreeLevel) -> tuple[Guesses, Any]:
        """Guesses the likeliest tokens after each node."""
        guesses, known = super().expand(shared, carried, level._replace(needed=None, scored=True))
        assert guesses.log_probs is not None, "asked for"
        tokens = jnp.where(jnp.isfinite(guesses.log_probs), guesses.tokens, -1)
        return Guesses(tokens, guesses.log_probs if level.scored else None), known
