"""Rows cut into chunks, each beside the tokens that the windows of its queries reach back to."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from lin_jax.attention.bias import RelativeBias
from lin_jax.attention.chunks import cut
from lin_jax.attention.layout import Layout, first_segment_id
from lin_jax.attention.memory import carried_segment_ids
from lin_jax.attention.pairs import per_head
from lin_jax.attention.window import AttentionWindow, NearFarMasks
from lin_jax.attention.windowed_state import Fold, WindowedState, WindowNodes, in_order


@dataclass(frozen=True)
class WindowedRows:
    """Rows as `n` chunks of c tokens, behind `m` chunks that hold a state's window, or nothing.

    Chunk j is scored directly against itself and the m before it; whatever lies further back is in the memory. Arrays
    of positions, segment ids and included tokens have one row where all rows are alike.
    """

    window: AttentionWindow
    queries: Array  # [B, n, c, K, R, D]
    tokens: WindowNodes  # [B, m + n, c, ...]
    segment_ids: Array  # [B or 1, m + n, c], 0 where there is no token that may be attended to
    positions: Array  # [B or 1, m + n, c]
    query_segment_ids: Array  # [B or 1, n, c]
    first: Array  # [B or 1]
    before: int  # m
    length: int
    simple: bool
    """Each row is one document from position 0: groups are chunks, and no memory begins anew."""

    @classmethod
    def of(
        cls, window: AttentionWindow, queries: Array, tokens: WindowNodes, layout: Layout, state: WindowedState | None
    ) -> "WindowedRows":
        """Cuts rows up: `queries` `[B, T, K, R, D]` and `tokens` `[B, T, ...]`, behind the window of a state."""
        simple = layout.aligned and state is None
        before, size = window.chunks_before(aligned=simple), window.chunk
        segment_ids = jnp.where(layout.valid, layout.segment_ids, 0)
        positions, owners = layout.positions, layout.segment_ids
        if simple and layout.present is None:
            segment_ids, positions, owners = segment_ids[:1], positions[:1], owners[:1]
        first = first_segment_id(layout.segment_ids)[: segment_ids.shape[0]]
        front = before * size
        if state is not None:
            kept, slots = in_order(window, state)
            front -= window.capacity
            tokens = jax.tree.map(lambda old, new: jnp.concatenate([old.astype(new.dtype), new], axis=1), kept, tokens)
            ids = jnp.where(slots.mask, first[:, None], 0).astype(segment_ids.dtype)
            segment_ids = jnp.concatenate([ids, segment_ids], axis=1)
            positions = jnp.concatenate([slots.positions.astype(positions.dtype), positions], axis=1)
        if tokens.decays is not None:
            tokens = tokens._replace(decays=jnp.where(segment_ids[..., None] > 0, tokens.decays, 0))
        return cls(
            window=window,
            queries=cut(queries, size),
            tokens=jax.tree.map(lambda part: cut(part, size, front), tokens),
            segment_ids=cut(segment_ids, size, front),
            positions=cut(positions, size, front),
            query_segment_ids=cut(owners, size),
            first=first,
            before=before,
            length=queries.shape[1],
            simple=simple,
        )

    def _beside(self, chunks: Array) -> Array:
        """Each chunk behind the `m` before it, `[B, n, (m + 1) c, ...]`."""
        count = self.queries.shape[1]
        return jnp.concatenate([chunks[:, at : at + count] for at in range(self.before + 1)], axis=2)

    @property
    def beside(self) -> WindowNodes:
        """Tokens `[B, n, (m + 1) c, ...]` that each chunk's queries are scored against directly."""
        return jax.tree.map(self._beside, self.tokens)

    @property
    def masks(self) -> NearFarMasks:
        """Masks of the pairs of a chunk's queries and the tokens beside it."""
        segment_ids = self._beside(self.segment_ids)
        together = (self.query_segment_ids[..., None] == segment_ids[..., None, :]) & (segment_ids > 0)[..., None, :]
        masks = self.window.masks(self.positions[:, self.before :], self._beside(self.positions), together)
        # Where groups are chunks, all tokens beside a chunk are near.
        return masks._replace(far=None) if self.simple and self.window.tokens is None else masks

    def bias(self, bias: RelativeBias | None) -> Array | None:
        """The relative bias `[B, n, K, R, c, (m + 1) c]` of a chunk's queries and the tokens beside it."""
        if bias is None:
            return None
        between = bias.between(self.positions[:, self.before :], self._beside(self.positions))
        return per_head(between, self.tokens.keys.shape[3])

    @property
    def sums_beside(self) -> Array | None:
        """Sums `[B, n, (m + 1) c, K]` of the logarithms of decay over the tokens beside a chunk; None without decay."""
        return None if self.tokens.decays is None else jnp.cumsum(self._beside(self.tokens.decays), axis=2)

    @property
    def _carried(self) -> Array:
        return carried_segment_ids(self.segment_ids, self.first)

    @property
    def reads_memory(self) -> Bool[Array, "B n c"]:
        """Mask of the queries that belong to the document of the memory before the tokens beside their chunk."""
        if self.simple:
            return jnp.ones((1, 1, 1), bool)
        held = jnp.concatenate([self.first[:, None], self._carried[:, :-1]], axis=1)[:, : self.queries.shape[1]]
        return self.query_segment_ids == held[..., None]

    def memories(self, initial: Array, fold: Fold, *, whole: bool) -> tuple[Array, Array]:
        """The memory `[B, n, K, M, E]` before the tokens beside each chunk and, if `whole`, the one after the row.

        Each is decayed up to the last token in it. Tokens in the window of the query after the row are left out.
        """
        count = self.queries.shape[1]
        used = self.segment_ids.shape[1] if whole else max(count - 1, 0)
        included, keep = self.segment_ids > 0, None
        if not self.simple:
            carried = self._carried
            previous = jnp.concatenate([self.first[:, None], carried[:, :-1]], axis=1)
            keep = carried == previous
            included = self.segment_ids == carried[..., None]
        if whole:
            last = self._carried[:, -1:, None]
            ends = jnp.max(jnp.where(self.segment_ids == last, self.positions + 1, 0), axis=(1, 2), keepdims=True)
            included &= (self.segment_ids != last) | (self.positions < self.window.start(ends))
        tokens = jax.tree.map(lambda part: part[:, :used], self.tokens)
        before, after = _scan(initial, tokens, included[:, :used], None if keep is None else keep[:, :used], fold)
        if not whole:
            before = jnp.concatenate([before, after[:, None]], axis=1)
        return before[:, :count], after

    def flatten(self, outputs: Array) -> Array:
        """Chunks of outputs back to rows `[B, T, K, R, E]`."""
        batch, count, size = outputs.shape[:3]
        return outputs.reshape(batch, count * size, *outputs.shape[3:])[:, : self.length]


def _scan(
    initial: Array, tokens: WindowNodes, included: Bool[Array, "#B n c"], keep: Bool[Array, "#B n"] | None, fold: Fold
) -> tuple[Array, Array]:
    """The memories `[B, n, K, M, E]` before each chunk, and the one after the last.

    Args:
        initial: `[B, K, M, E]` the memory before the first chunk.
        tokens: `[B, n, c, ...]`.
        included: the tokens that are added.
        keep: whether the memory so far survives a chunk; False where another document has begun. None is always.
        fold: what tokens add.
    """
    factors, across = included[..., None], None
    if tokens.decays is not None:
        decays = jnp.where(included[..., None], tokens.decays, 0)
        after = jnp.cumsum(decays[:, :, ::-1], axis=2)[:, :, ::-1]
        factors, across = included[..., None] * jnp.exp(after - decays), jnp.exp(after[:, :, 0])

    def step(memory: Array, chunk: Any) -> tuple[Array, Array]:
        update, kept, factor = chunk
        carried = memory if factor is None else memory * factor[..., None, None].astype(memory.dtype)
        if kept is not None:
            carried = jnp.where(kept[:, None, None, None], carried, 0)
        return carried + update, memory

    parts = fold(tokens.keys, tokens.values, factors), keep, across
    chunks = tuple(None if part is None else jnp.moveaxis(part, 1, 0) for part in parts)
    last, before = jax.lax.scan(step, initial, chunks)
    return jnp.moveaxis(before, 0, 1), last
