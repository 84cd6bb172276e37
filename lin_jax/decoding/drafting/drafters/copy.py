"""Copies on from the one place of a memory that agrees longest with a text: the cheapest drafts of known passages."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from lin_jax.decoding.drafting.api import DraftContext, Guesses, Stateless, TreeLevel
from lin_jax.decoding.drafting.suffix_index import SuffixIndex, search
from lin_jax.decoding.drafting.text_memory import TextMemory

# Last tokens by which places are told apart that agree in as many as the index compares.
LONGEST_CONTEXT = 256
# Probability that a token copied after a match of one token is wrong, and its factor for each further token.
_DOUBT, _DECAY = 0.65, 0.8


class Passage(NamedTuple):
    """Copied passage of each row.

    Attributes:
        tokens: `[B, D]` the tokens that follow it in the memory; -1 after the end of its text, or without a place.
        size: `[B]` number of last tokens that agree.
    """

    tokens: Int[Array, "B D"]
    size: Int[Array, " B"]


class CopyDrafter(Stateless):
    """Guesses what followed the longest match of the last tokens in a memory of earlier texts.

    Of places that agree as long (up to 256 tokens) it copies from the one that more tokens follow, and of those from
    the latest: in a text that went round in circles the place before its end would give little, and only a long match
    tells in which round it is. There is no vote and the text itself is not searched, as `SuffixDrafter` does both, so
    that a chain of any length costs one binary search.

    Args:
        memory: earlier texts.
        depth: number of tokens to copy.
        candidates: places to choose from that agree longest, up to 32 tokens.
    """

    width = 1
    lookback = LONGEST_CONTEXT

    def __init__(self, memory: TextMemory, *, depth: int = 31, candidates: int = 32) -> None:
        self.index = memory.index
        self.depth = depth
        self.candidates = candidates

    def begin(self, context: DraftContext, state: None) -> tuple[Passage, Bool[Array, "B 1"]]:
        """Finds the passage; it agrees with the root."""
        del state
        index = SuffixIndex(*self.index.get_value())
        found = search(index, context.recent, self.depth, self.candidates)
        back = jnp.arange(min(self.lookback, context.recent.shape[1]), dtype=jnp.int32)
        pattern = jnp.flip(context.recent, axis=1)[:, None, : back.size]
        # Before the first text there are tokens that agree with none.
        other = (index.tokens[jnp.maximum(found.places[:, :, None] - back, 0)] != pattern) | (pattern < 0)
        sizes = jnp.where(found.sizes > 0, jnp.min(jnp.where(other, back, back.size), axis=2), 0)
        follow = jnp.sum(found.followers >= 0, axis=2)
        best = jnp.argmax(sizes * (self.depth + 1) + follow, axis=1)[:, None]
        size = jnp.take_along_axis(sizes, best, axis=1)[:, 0]
        tokens = jnp.take_along_axis(found.followers, best[:, :, None], axis=1)[:, 0]
        return Passage(jnp.where(size[:, None] > 0, tokens, -1), size), jnp.ones((size.shape[0], 1), bool)

    def expand(
        self, shared: Passage, carried: Bool[Array, "B K"], level: TreeLevel
    ) -> tuple[Guesses, Bool[Array, "B K"]]:
        """Guesses the next token of the passage below the node that it leads to."""
        here = carried
        if level.depth:
            here = here & (level.tokens == shared.tokens[:, level.depth - 1, None])
        tokens = jnp.where(here, shared.tokens[:, level.depth, None], -1)
        log_probs = None
        if level.scored:
            right = 1 - _DOUBT * jnp.float32(_DECAY) ** (shared.size[:, None] + level.depth - 1)
            log_probs = jnp.where(tokens >= 0, jnp.log(right), -jnp.inf)[:, :, None]
        return Guesses(tokens[:, :, None], log_probs), here
