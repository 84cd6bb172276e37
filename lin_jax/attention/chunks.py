"""Rows cut into group-sized chunks: keys that a chunk scores directly, and keys that it reads from the memory."""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool

from lin_jax.attention.bias import RelativeBias
from lin_jax.attention.layout import Layout
from lin_jax.attention.memory import scan_memory
from lin_jax.attention.pairs import PairMasks, causal_masks, per_head
from pallas_kernels.chunks import carried_segment_ids, cut, first_segment_id
from pallas_kernels.types import AugmentedState


@dataclass(frozen=True)
class Chunks:
    """Rows cut into `n` chunks of one group's length, each with the window of keys that its queries score directly.

    Where groups begin at multiples of G in the row, the window is the chunk itself. Where they do not (packed
    documents, or a state that ends inside a group), it is the chunk and the one before it: two tokens of one group are
    less than G apart, so whatever lies further back is in a finished group and is read from the memory.
    """

    queries: Array  # [B, n, G, K, R, D]
    keys: Array  # [B, m, G, K, D], m = n or, with the chunk that precedes the row, n + 1
    values: Array  # [B, m, G, K, E]
    segment_ids: Array  # [B, m, G]
    positions: Array  # [B, m, G]
    present: Array | None  # [B, n, G], where rows are aligned and not all tokens are present
    first: Array  # [B]
    length: int
    aligned: bool

    @classmethod
    def of(
        cls,
        queries: Array,
        keys: Array,
        values: Array,
        layout: Layout,
        state: AugmentedState | None,
        size: int,
    ) -> "Chunks":
        """Cuts rows up, with the state's unfinished group (or emptiness) as the chunk before them.

        Rows that are continued from the end of a group need none.
        """
        length = keys.shape[1]
        if layout.continued:
            state = None
        aligned = layout.aligned and state is None
        first = first_segment_id(layout.segment_ids)
        segment_ids, positions = layout.segment_ids, layout.positions
        front = 0 if aligned or state is not None else size
        if state is not None:
            start = state.position // size * size
            slots = start[:, None] + jnp.arange(size)
            held = jnp.where(slots < state.position[:, None], first[:, None], 0)
            keys = jnp.concatenate([state.keys.astype(keys.dtype), keys], axis=1)
            values = jnp.concatenate([state.values.astype(values.dtype), values], axis=1)
            segment_ids = jnp.concatenate([held.astype(segment_ids.dtype), segment_ids], axis=1)
            positions = jnp.concatenate([slots.astype(positions.dtype), positions], axis=1)
        present = None if layout.present is None or not aligned else cut(layout.present, size)
        return cls(
            queries=cut(queries, size),
            keys=cut(keys, size, front),
            values=cut(values, size, front),
            segment_ids=cut(segment_ids, size, front),
            positions=cut(positions, size, front),
            present=present,
            first=first,
            length=length,
            aligned=aligned,
        )

    def _window(self, chunks: Array) -> Array:
        return chunks if self.aligned else jnp.concatenate([chunks[:, :-1], chunks[:, 1:]], axis=2)

    @property
    def window_keys(self) -> Array:
        """Keys `[B, n, M, K, D]` that each chunk's queries score directly."""
        return self._window(self.keys)

    @property
    def window_values(self) -> Array:
        """Values `[B, n, M, K, E]` beside them."""
        return self._window(self.values)

    @property
    def _query_segment_ids(self) -> Array:
        return self.segment_ids[:, -self.queries.shape[1] :]

    @property
    def masks(self) -> PairMasks:
        """Masks of the pairs of a chunk's queries and its window's keys."""
        if self.aligned:
            size = self.keys.shape[2]
            causal = jnp.tri(size, dtype=bool)[None, None]
            return PairMasks(causal if self.present is None else causal & self.present[:, :, None, :], None)
        count = self.queries.shape[1]
        segment_ids = self._window(self.segment_ids)
        same = self._query_segment_ids[..., :, None] == segment_ids[..., None, :]
        together = same & (segment_ids > 0)[..., None, :]
        return causal_masks(self.positions[:, -count:], self._window(self.positions), self.queries.shape[2], together)

    def bias(self, bias: RelativeBias | None) -> Array | None:
        """The relative bias `[B, n, K, R, G, M]` of a chunk's queries and its window's keys."""
        if bias is None:
            return None
        if self.aligned:
            order = jnp.arange(self.keys.shape[2])
            between = bias.between(order, order)[None, None]
        else:
            between = bias.between(self.positions[:, -self.queries.shape[1] :], self._window(self.positions))
        return per_head(between, self.keys.shape[3])

    @property
    def _carried(self) -> Array:
        return carried_segment_ids(self.segment_ids, self.first)

    @property
    def reads_memory(self) -> Bool[Array, "B n G"]:
        """Mask of the queries that belong to the document of the memory before their window."""
        if self.aligned:
            return jnp.ones((1, 1, 1), bool)
        speaks_of = jnp.concatenate([self.first[:, None], self._carried[:, :-1]], axis=1)
        return self._query_segment_ids == speaks_of[:, : self.queries.shape[1], None]

    def memories(self, initial: Array, fold: Callable[..., Array], *, whole: bool) -> tuple[Array, Array]:
        """The memory `[B, n, K, M, E]` before each window and, if `whole`, the one after the row.

        The unfinished group at the end of each row is left out. `fold(keys, values, included)` is what tokens add.
        """
        count = self.queries.shape[1]
        used = self.keys.shape[1] if whole else count - 1
        keys, values = self.keys[:, :used], self.values[:, :used]
        keep = None
        included = None if self.present is None else self.present[:, :used]
        if not self.aligned:
            carried = self._carried
            previous = jnp.concatenate([self.first[:, None], carried[:, :-1]], axis=1)
            segment_ids = self.segment_ids
            last = carried[:, -1:, None]
            ends = jnp.max(jnp.where(segment_ids == last, self.positions + 1, 0), axis=(1, 2), keepdims=True)
            size = self.keys.shape[2]
            unfinished = (segment_ids == last) & (self.positions >= ends // size * size)
            included = ((segment_ids == carried[..., None]) & ~unfinished)[:, :used]
            keep = (carried == previous)[:, :used]
        scan = scan_memory(fold(keys, values, included), initial, keep)
        before = jnp.moveaxis(scan.before, 0, 1)
        if not whole:
            before = jnp.concatenate([before, scan.after[:, None]], axis=1)
        return before[:, :count], scan.after

    def flatten(self, outputs: Array) -> Array:
        """Chunks of outputs back to rows `[B, T, K, R, E]`."""
        batch, count, size = outputs.shape[:3]
        return outputs.reshape(batch, count * size, *outputs.shape[3:])[:, : self.length]
