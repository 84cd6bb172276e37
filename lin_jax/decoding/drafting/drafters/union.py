"""Union of several drafters, side by side."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lin_jax.decoding.drafting.api import DraftContext, Drafter, Guesses, TreeLevel, no_guesses


class UnionDrafter(nnx.Module):
    """Lets several drafters guess for every node: the ranks of the second begin where those of the first end."""

    def __init__(self, *drafters: Drafter) -> None:
        self.drafters = nnx.List(drafters)
        self.depth = max(drafter.depth for drafter in drafters)
        self.width = sum(drafter.width for drafter in drafters)
        self.lookback = max(drafter.lookback for drafter in drafters)

    def init_state(self, batch: int, capacity: int) -> tuple[Any, ...]:
        """States of all drafters."""
        return tuple(drafter.init_state(batch, capacity) for drafter in self.drafters)

    def prefill(self, state: tuple[Any, ...], tokens: Array, lengths: Array) -> tuple[Any, ...]:
        """Passes a chunk of the prompts to all drafters."""
        return tuple(each.prefill(own, tokens, lengths) for each, own in zip(self.drafters, state, strict=True))

    def commit(self, state: tuple[Any, ...], path: Array, length: Array) -> tuple[Any, ...]:
        """Passes the accepted path to all drafters."""
        return tuple(each.commit(own, path, length) for each, own in zip(self.drafters, state, strict=True))

    def begin(self, context: DraftContext, state: tuple[Any, ...]) -> tuple[Any, Any]:
        """Starts all drafters; each gets the last `lookback` tokens of its own."""
        begun = [
            each.begin(context._replace(recent=context.recent[:, context.recent.shape[1] - each.lookback :]), own)
            for each, own in zip(self.drafters, state, strict=True)
        ]
        shared, carried = zip(*begun, strict=True)
        return shared, carried

    def expand(self, shared: Any, carried: Any, level: TreeLevel) -> tuple[Guesses, Any]:
        """Joins the guesses of all along the ranks."""
        tokens: list[Array] = []
        log_probs: list[Array] = []
        known: list[Any] = []
        begins = 0
        for each, own_shared, own_carried in zip(self.drafters, shared, carried, strict=True):
            # In a static tree the first ranks are the first drafter's; a dynamic tree compares the guesses of all.
            ranks = min(each.width, level.ranks if level.scored else max(level.ranks - begins, 0))
            ends = begins + each.width
            needed = None if level.needed is None else frozenset(r - begins for r in level.needed if begins <= r < ends)
            part, own = level._replace(ranks=max(ranks, 1), needed=needed), own_carried
            guesses = no_guesses(part)
            if level.depth < each.depth and needed != frozenset():
                guesses, own = each.expand(own_shared, own_carried, part)
            tokens.append(guesses.tokens[:, :, :ranks])
            if guesses.log_probs is not None:
                log_probs.append(guesses.log_probs[:, :, :ranks])
            known.append(own)
            begins = ends
        joined = jnp.concatenate(tokens, axis=2)
        if not level.scored:
            return Guesses(joined, None), tuple(known)
        scores = _without_duplicates(joined, jnp.concatenate(log_probs, axis=2))
        best, order = jax.lax.top_k(scores, level.ranks)
        return Guesses(jnp.take_along_axis(joined, order, axis=2), best), tuple(known)


def _without_duplicates(tokens: Int[Array, "B K R"], log_probs: Float[Array, "B K R"]) -> Float[Array, "B K R"]:
    """Log-probabilities, minus infinity where the same token has a likelier guess, or an earlier equal one."""
    rank = jnp.arange(tokens.shape[2])
    likelier = log_probs[..., None, :] > log_probs[..., :, None]
    earlier = (log_probs[..., None, :] == log_probs[..., :, None]) & (rank[None, :] < rank[:, None])
    twin = jnp.any((tokens[..., None, :] == tokens[..., :, None]) & (likelier | earlier), axis=-1)
    return jnp.where(twin, -jnp.inf, log_probs)
