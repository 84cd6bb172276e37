"""Prompt lookup (Saxena 2023) as a drafter: what followed earlier occurrences of the last few tokens."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from lin_jax.decoding.draft import DraftContext, Guesses, Layer, Stateless
from lin_jax.decoding.ngram import Matches, find_matches


class NgramDrafter(Stateless):
    """What followed the best earlier occurrences, merged into a trie.

    An occurrence is the better the longer the match, then the later. At every node the occurrences that agree with the
    node's path vote for what follows; each one's vote counts `confidence` of its match.

    Args:
        depth: tokens to copy.
        matches: occurrences to look at; one makes a chain.
        lookback: how many of the last tokens to search.
        confidence: how likely a copied token is right after a match of 1, 2, ... tokens; their number is the longest
            match that is looked for.
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

    def begin(self, context: DraftContext, state: Any) -> tuple[Matches, Bool[Array, "B 1 M"]]:
        """The occurrences; all that were found agree with the root."""
        del state
        found = find_matches(context.recent, self.depth, len(self.confidence), self.width)
        return found, (found.sizes > 0)[:, None]

    def expand(
        self, shared: Matches, carried: Bool[Array, "B K M"], layer: Layer
    ) -> tuple[Guesses, Bool[Array, "B K M"]]:
        """What the occurrences that agree with a node say, the best supported token first."""
        agree = carried
        if layer.depth:
            agree = agree & (shared.followers[:, None, :, layer.depth - 1] == layer.tokens[:, :, None])
        tokens = shared.followers[:, :, layer.depth]
        votes = jnp.asarray((0.0, *self.confidence))[shared.sizes]
        weights = jnp.where(agree, votes[:, None], 0)
        alike = tokens[:, :, None] == tokens[:, None, :]
        support = jnp.einsum("bkm,bmn->bkn", weights, alike.astype(weights.dtype))
        earlier = jnp.tri(self.width, k=-1, dtype=bool)
        repeated = jnp.any(alike[:, None] & earlier & agree[:, :, None, :], axis=3)
        # As sure as the best match is, shared out among what the matches say.
        sure = jnp.max(weights, axis=2, keepdims=True) / jnp.maximum(jnp.sum(weights, axis=2, keepdims=True), 1e-9)
        score = jnp.where(agree & ~repeated, support * sure, 0)
        best, order = jax.lax.top_k(score, layer.ranks)
        chosen = jnp.take_along_axis(jnp.broadcast_to(tokens[:, None], score.shape), order, axis=2)
        log_probs = jnp.where(best > 0, jnp.log(jnp.maximum(best, 1e-30)), -jnp.inf) if layer.scored else None
        return Guesses(jnp.where(best > 0, chosen, -1), log_probs), agree
