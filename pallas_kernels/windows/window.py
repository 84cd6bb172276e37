"""Windows: the tokens just before a query that it attends to one by one; all tokens before them are in a memory."""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# Tokens of a chunk of rows at least: smaller windows would make many small products.
SMALLEST_CHUNK = 32


class NearFarMasks(NamedTuple):
    """Masks of (query, key) pairs.

    Attributes:
        near: the key is in the query's window, or a sink.
        far: the key is before the window, so that it counts through the memory. None where there is no such pair.
    """

    near: Bool[Array, "*batch T S"]
    far: Bool[Array, "*batch T S"] | None

    def with_near_among_far(self) -> "NearFarMasks":
        """The same with near pairs among the far ones."""
        return self._replace(far=self.near if self.far is None else self.near | self.far)


@dataclass(frozen=True)
class AttentionWindow:
    """The window of each query, by absolute position in the document.

    Attributes:
        tokens: a sliding window holds exactly this many, the query's own included; None is a window of groups; zero is
            none at all, so that the query's own token, too, counts through the memory.
        group_size: tokens of a group.
        groups: finished groups before the query's own that a window of groups holds.
        sinks: tokens at the beginning of a document that stay near for ever, and never enter the memory.
    """

    tokens: int | None
    group_size: int = 64
    groups: int = 1
    sinks: int = 0

    @property
    def capacity(self) -> int:
        """Slots `C` for the tokens before the next query that a window may hold; position p is in slot `p % C`."""
        return (self.groups + 1) * self.group_size if self.tokens is None else max(self.tokens - 1, 0)

    @property
    def leaving(self) -> int:
        """Tokens that leave the window at a time."""
        return self.group_size if self.tokens is None else 1

    @property
    def chunk(self) -> int:
        """Tokens of the chunks that rows are cut into.

        A window of tokens reaches back one less than that; chunks of as many as it holds are more often of an even
        size, which processors compute with sooner, and fill rows of a power of two.
        """
        return self.group_size if self.tokens is None else max(self.tokens, SMALLEST_CHUNK)

    def chunks_before(self, *, aligned: bool) -> int:
        """Chunks before a query's own that reach to the start of its window, if chunks begin where groups do or not."""
        if self.tokens is None:
            return self.groups if aligned else self.groups + 1
        return -(-self.capacity // self.chunk)

    def start(self, positions: Int[Array, "*batch T"]) -> Int[Array, "*batch T"]:
        """Positions at which the windows of queries begin, negative ones included."""
        if self.tokens is None:
            return (positions // self.group_size - self.groups) * self.group_size
        return positions - self.tokens + 1

    def masks(
        self,
        queries: Int[Array, "*batch T"],
        keys: Int[Array, "*batch S"],
        together: Bool[Array, "*batch T S"],
    ) -> NearFarMasks:
        """Masks of the pairs that are `together` (same document, none of them padding), by absolute position."""
        start, key = self.start(queries)[..., :, None], keys[..., None, :]
        causal = together & (key <= queries[..., :, None])
        if not self.sinks:
            return NearFarMasks(causal & (key >= start), causal & (key < start))
        near = (key >= start) | (key < self.sinks)
        return NearFarMasks(causal & near, causal & ~near)

    def both_sides(
        self, positions: Int[Array, "*batch T"], together: Bool[Array, "*batch T T"]
    ) -> Bool[Array, "*batch T T"]:
        """The mask of an encoder's window: as many tokens, or groups, on either side; and its sinks."""
        query, key = positions[..., :, None], positions[..., None, :]
        if self.tokens is not None:
            near = jnp.abs(query - key) < self.tokens
        else:
            near = jnp.abs(query // self.group_size - key // self.group_size) <= self.groups
        return together & (near | (key < self.sinks) if self.sinks else near)
