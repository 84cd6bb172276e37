"""Drafters: where guesses come from. Each offers a table of guesses, by depth and rank, for the tokens after the root.

Guess `[m, r]` is the rank-r guess of the token m + 1 after the root; -1 says that there is none.
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lin_jax.decoding.ngram import latest_continuation
from lin_jax.models import MedusaHeads


class DraftContext(NamedTuple):
    """What a drafter may look at.

    Attributes:
        hidden: `[B, E]` the hidden vector from which the root was chosen.
        tokens: `[B, C]` prompt and output so far, the root last.
        length: `[B]` how many of them there are.
    """

    hidden: Float[Array, "B E"]
    tokens: Int[Array, "B C"]
    length: Int[Array, " B"]


class Drafter(Protocol):
    """The contract: a table of `depth` by `width` guesses for every row."""

    depth: int
    width: int

    def guess(self, context: DraftContext) -> Int[Array, "B M R"]:
        """Guesses, best rank first; -1 where there is none."""


class NoDrafter(nnx.Module):
    """Plain decoding: no guesses."""

    depth = 0
    width = 0

    def guess(self, context: DraftContext) -> Int[Array, "B M R"]:
        """An empty table."""
        return jnp.zeros((context.length.shape[0], 0, 0), jnp.int32)


class MedusaDrafter(nnx.Module):
    """The most probable tokens of every Medusa head."""

    def __init__(self, heads: MedusaHeads, *, width: int = 10, depth: int | None = None) -> None:
        self.heads = heads
        self.depth = depth or heads.count
        self.width = min(width, heads.output.shape[-1])

    def guess(self, context: DraftContext) -> Int[Array, "B M R"]:
        """The `width` best tokens of the first `depth` heads."""
        logits = self.heads(context.hidden, self.depth)
        if self.width == 1:
            return jnp.argmax(logits, axis=-1, keepdims=True).astype(jnp.int32)
        return jax.lax.top_k(logits, self.width)[1].astype(jnp.int32)


class NgramDrafter(nnx.Module):
    """Prompt lookup (Saxena 2023): what followed the latest earlier occurrence of the last tokens."""

    width = 1

    def __init__(self, *, depth: int = 4, longest: int = 3) -> None:
        self.depth = depth
        self.longest = longest

    def guess(self, context: DraftContext) -> Int[Array, "B M R"]:
        """One guess for each depth; none where the last token never occurred before."""
        return latest_continuation(context.tokens, context.length, self.depth, self.longest)[:, :, None]


class UnionDrafter(nnx.Module):
    """Several drafters side by side: the ranks of the second begin where those of the first end."""

    def __init__(self, *drafters: Drafter) -> None:
        self.drafters = nnx.List(drafters)
        self.depth = max(drafter.depth for drafter in drafters)
        self.width = sum(drafter.width for drafter in drafters)

    def guess(self, context: DraftContext) -> Int[Array, "B M R"]:
        """All tables, joined along the ranks."""
        tables = (drafter.guess(context) for drafter in self.drafters)
        return jnp.concatenate(
            [
                jnp.pad(table, ((0, 0), (0, self.depth - table.shape[1]), (0, 0)), constant_values=-1)
                for table in tables
            ],
            axis=2,
        )
