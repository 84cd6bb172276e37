"""Rows cut into group-sized chunks: which keys a chunk scores directly, and which it reads from the memory."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool

from lin_jax.attention.grouped import carried_documents, fold, scan_memory
from lin_jax.attention.layout import Layout, first_document
from lin_jax.attention.pairs import PairMasks, causal_masks
from lin_jax.attention.state import AugmentedState


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
    documents: Array  # [B, m, G]
    positions: Array  # [B, m, G]
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
        """Cuts rows up, with the state's unfinished group (or emptiness) as the chunk before them."""
        batch, length = keys.shape[:2]
        aligned = layout.aligned and state is None
        first = first_document(layout.documents)
        documents, positions = layout.documents, layout.positions
        front = 0 if aligned or state is not None else size
        if state is not None:
            start = state.position // size * size
            slots = start[:, None] + jnp.arange(size)
            held = jnp.where(slots < state.position[:, None], first[:, None], 0)
            keys = jnp.concatenate([state.keys.astype(keys.dtype), keys], axis=1)
            values = jnp.concatenate([state.values.astype(values.dtype), values], axis=1)
            documents = jnp.concatenate([held.astype(documents.dtype), documents], axis=1)
            positions = jnp.concatenate([slots.astype(positions.dtype), positions], axis=1)
        back = -length % size

        def cut(x: Array, front: int = front) -> Array:
            padded = jnp.pad(x, ((0, 0), (front, back), *((0, 0),) * (x.ndim - 2)))
            return padded.reshape(batch, -1, size, *x.shape[2:])

        return cls(cut(queries, 0), cut(keys), cut(values), cut(documents), cut(positions), first, length, aligned)

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
    def _query_documents(self) -> Array:
        return self.documents[:, -self.queries.shape[1] :]

    @property
    def masks(self) -> PairMasks:
        """Which pairs of a chunk's queries and its window's keys meet."""
        if self.aligned:
            size = self.keys.shape[2]
            return PairMasks(jnp.tri(size, dtype=bool)[None, None], None)
        count = self.queries.shape[1]
        documents = self._window(self.documents)
        together = (self._query_documents[..., :, None] == documents[..., None, :]) & (documents > 0)[..., None, :]
        return causal_masks(self.positions[:, -count:], self._window(self.positions), self.queries.shape[2], together)

    @property
    def _carried(self) -> Array:
        return carried_documents(self.documents, self.first)

    @property
    def reads_memory(self) -> Bool[Array, "B n G"]:
        """Which queries belong to the document that the memory before their window speaks of."""
        if self.aligned:
            return jnp.ones((1, 1, 1), bool)
        speaks_of = jnp.concatenate([self.first[:, None], self._carried[:, :-1]], axis=1)
        return self._query_documents == speaks_of[:, : self.queries.shape[1], None]

    def memories(self, initial: Array, *, whole: bool) -> tuple[Array, Array]:
        """The memory `[B, n, K, D, E]` before each window and, if `whole`, the one after the row.

        The unfinished group at the end of each row is left out of it.
        """
        count = self.queries.shape[1]
        used = self.keys.shape[1] if whole else count - 1
        keys, values = self.keys[:, :used], self.values[:, :used]
        included = keep = None
        if not self.aligned:
            carried = self._carried
            previous = jnp.concatenate([self.first[:, None], carried[:, :-1]], axis=1)
            documents = self.documents
            last = carried[:, -1:, None]
            ends = jnp.max(jnp.where(documents == last, self.positions + 1, 0), axis=(1, 2), keepdims=True)
            size = self.keys.shape[2]
            unfinished = (documents == last) & (self.positions >= ends // size * size)
            included = ((documents == carried[..., None]) & ~unfinished)[:, :used]
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
