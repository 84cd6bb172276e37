"""Prompt lookup (Saxena 2023) as a drafter: copies what followed earlier occurrences of the last few tokens."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from lin_jax.decoding.drafting.api import DraftContext, Guesses, Stateless, TreeLevel
from lin_jax.decoding.drafting.hindsight import LookupHindsight
from lin_jax.decoding.drafting.ngram_lookup import Matches, find_matches


class NgramDrafter(Stateless):
    """Guesses what followed the best earlier occurrences, merged into a trie.

    An occurrence is better the longer its match, then the later it is. At every node the occurrences that agree with
    the node's path vote for the next token; each vote has the weight `confidence` of its match.

    Args:
        depth: number of tokens to copy.
        matches: number of occurrences to use; one gives a chain.
        lookback: number of last tokens to search.
        confidence: probability that a copied token is right after a match of 1, 2, ... tokens; as many as the longest
            match that is searched for.
    """

    def __init__(
        self,
        *,
        depth: int = 8,
        matches: int = 1,
        lookback: int = 2048,
        confidence: tuple[float, ...] = (0.35, 0.55, 0.7),
    ) -> None:
        self.depth = depth
        self.width = matches
        self.lookback = lookback
        self.confidence = confidence

    def hindsight(self, depth: int) -> LookupHindsight:
        """Follows a text on the host, where a lookup costs nothing."""
        return LookupHindsight(min(depth, self.depth), len(self.confidence), self.lookback)

    def begin(self, context: DraftContext, state: Any) -> tuple[Matches, Bool[Array, "B 1 M"]]:
        """Finds the occurrences; all of them agree with the root."""
        del state
        found = find_matches(context.recent, self.depth, len(self.confidence), self.width)
        return found, (found.sizes > 0)[:, None]

    def expand(
        self, shared: Matches, carried: Bool[Array, "B K M"], level: TreeLevel
    ) -> tuple[Guesses, Bool[Array, "B K M"]]:
        """Guesses the tokens of the occurrences that agree with each node, the best supported first."""
        agree = carried
        if level.depth:
            agree = agree & (shared.followers[:, None, :, level.depth - 1] == level.tokens[:, :, None])
        tokens = shared.followers[:, :, level.depth]
        votes = jnp.asarray((0.0, *self.confidence))[shared.sizes]
        weights = jnp.where(agree, votes[:, None], 0)
        alike = tokens[:, :, None] == tokens[:, None, :]
        support = jnp.einsum("bkm,bmn->bkn", weights, alike.astype(weights.dtype))
        earlier = jnp.tri(self.width, k=-1, dtype=bool)
        repeated = jnp.any(alike[:, None] & earlier & agree[:, :, None, :], axis=3)
        # The confidence of the best match, shared among the guesses.
        sure = jnp.max(weights, axis=2, keepdims=True) / jnp.maximum(jnp.sum(weights, axis=2, keepdims=True), 1e-9)
        score = jnp.where(agree & ~repeated, support * sure, 0)
        best, order = jax.lax.top_k(score, level.ranks)
        chosen = jnp.take_along_axis(jnp.broadcast_to(tokens[:, None], score.shape), order, axis=2)
        log_probs = jnp.where(best > 0, jnp.log(jnp.maximum(best, 1e-30)), -jnp.inf) if level.scored else None
        return Guesses(jnp.where(best > 0, chosen, -1), log_probs), agree
