"""Relative position bias: a learnt number per head for every bucket of distances (T5, Raffel et al. 2020)."""

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RelativeBias:
    """A table of biases and the rule that finds a distance's place in it.

    Attributes:
        table: `[N, H]` bias of each bucket and query head.
        bidirectional: whether keys after the query have buckets of their own; else they count as distance 0.
        max_distance: distances from here on share the last bucket.
    """

    table: Float[Array, "N H"]
    bidirectional: bool = field(metadata={"static": True})
    max_distance: int = field(metadata={"static": True})

    def between(
        self, query_positions: Int[Array, "*batch T"], key_positions: Int[Array, "*batch S"]
    ) -> Float[Array, "*batch H T S"]:
        """The bias of every (query, key) pair."""
        distance = query_positions[..., :, None] - key_positions[..., None, :]
        found = self.table[self.buckets(distance)]
        return jnp.moveaxis(found, -1, -3)

    def buckets(self, distance: Int[Array, "*pairs"]) -> Int[Array, "*pairs"]:
        """Buckets of distances `query - key`: one each while they are small, then logarithmically wider."""
        count = self.table.shape[0]
        first = jnp.zeros_like(distance)
        if self.bidirectional:
            count //= 2
            first = jnp.where(distance < 0, count, 0)
            distance = jnp.abs(distance)
        distance = jnp.maximum(distance, 0)
        exact = count // 2
        # In float32, as published: that decides which bucket a distance on an edge falls into.
        ratio = jnp.maximum(distance, exact).astype(jnp.float32) / exact
        wide = exact + (jnp.log(ratio) / math.log(self.max_distance / exact) * (count - exact)).astype(distance.dtype)
        return first + jnp.where(distance < exact, distance, jnp.minimum(wide, count - 1))
