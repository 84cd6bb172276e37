"""Rows cut into chunks, each beside the tokens that the windows of its queries reach back to, and its sinks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.chunks import carried_segment_ids, cut
from pallas_kernels.windows.clock import SplitSums, between, parts_of
from pallas_kernels.windows.window import AttentionWindow, NearFarMasks

# What tokens add to the memory: keys `[B, S, K, D]`, values `[B, S, K, E]`, factors `[B, S, K]` or None.
Fold = Callable[[Array, Array, Array | None], Array]


class WindowNodes(NamedTuple):
    """Keys, values and logarithms of decay of a draft tree's nodes (or of tokens), as a state keeps them.

    Attributes:
        keys: `[B, N, K, D]`.
        values: `[B, N, K, E]`.
        decays: `[B, N, K]`, or None.
    """

    keys: Float[Array, "*layers B N K D"]
    values: Float[Array, "*layers B N K E"]
    decays: Float[Array, "*layers B N K"] | None


class Sinks(NamedTuple):
    """Keys and values of the first tokens of a document, or of some documents.

    Attributes:
        keys: `[..., S, K, D]`, that of position p in slot p.
        values: `[..., S, K, E]`.
        mask: `[..., S]` slots in use.
    """

    keys: Float[Array, "*batch S K D"]
    values: Float[Array, "*batch S K E"]
    mask: Bool[Array, "*batch S"]


class Before(NamedTuple):
    """Tokens before the rows, of each row's first document.

    Attributes:
        tokens: `[B, P, ...]` the last of them, the newest last.
        positions: `[B, P]` of these, negative where there is none.
        sinks: its first tokens; None without sinks.
    """

    tokens: WindowNodes
    positions: Int[Array, "B P"]
    sinks: Sinks | None


class TokenPlaces(NamedTuple):
    """TokenPlaces of the tokens of rows.

    Attributes:
        segment_ids: `[B or 1, T]` number of a token's document, 0 where it may not be attended to.
        owners: `[B or 1, T]` number of a query's document.
        positions: `[B or 1, T]`.
        first: `[B or 1]` number of the rows' first document.
        aligned: whether each row is one document from position 0, so that groups are slices of it.
    """

    segment_ids: Int[Array, "#B T"]
    owners: Int[Array, "#B T"]
    positions: Int[Array, "#B T"]
    first: Int[Array, "#B"]
    aligned: bool

    @classmethod
    def whole(cls, length: int) -> "TokenPlaces":
        """Those of rows that are one document each, from its beginning, all alike."""
        ones = jnp.ones((1, length), jnp.int32)
        return cls(ones, ones, jnp.arange(length)[None], jnp.ones((1,), jnp.int32), aligned=True)


class Pairs(NamedTuple):
    """Tokens that queries `[..., T, K, R, D]` are scored against one by one.

    Attributes:
        tokens: keys `[..., S, K, D]` and values `[..., S, K, E]`.
        masks: of the pairs, `[..., T, S]`.
        factors: `[..., K, 1, T, S]` decay between them; None is one.
        bias: `[..., K, R, T, S]` added to the scores of near pairs, or None.
    """

    tokens: WindowNodes
    masks: NearFarMasks
    factors: Array | None
    bias: Array | None


@dataclass(frozen=True)
class WindowedRows:
    """Rows as `n` chunks of c tokens, behind `m` chunks that hold a state's window, or nothing.

    Chunk j is scored directly against itself, the m before it, and the sinks of the document that these begin with;
    whatever else lies further back is in the memory. Arrays of positions, segment ids and included tokens have one row
    where all rows are alike.
    """

    window: AttentionWindow
    queries: Array  # [B, n, c, K, R, D]
    tokens: WindowNodes  # [B, m + n, c, ...]
    segment_ids: Array  # [B or 1, m + n, c], 0 where there is no token that may be attended to
    positions: Array  # [B or 1, m + n, c]
    query_segment_ids: Array  # [B or 1, n, c]
    first: Array  # [B or 1]
    early_sinks: Sinks | None  # [B, S, ...], of what came before the rows
    before: int  # m
    length: int
    simple: bool
    """Each row is one document from position 0: groups are chunks, and no memory begins anew."""

    @classmethod
    def of(
        cls, window: AttentionWindow, queries: Array, tokens: WindowNodes, places: TokenPlaces, early: Before | None
    ) -> "WindowedRows":
        """Cuts rows up: `queries` `[B, T, K, R, D]` and `tokens` `[B, T, ...]`, behind what came before them."""
        simple = places.aligned and early is None
        before, size = window.chunks_before(aligned=simple), window.chunk
        segment_ids, positions = places.segment_ids, places.positions
        front = before * size
        if early is not None:
            kept = early.tokens
            front -= early.positions.shape[1]
            tokens = jax.tree.map(lambda old, new: jnp.concatenate([old.astype(new.dtype), new], axis=1), kept, tokens)
            # Sinks come with slots of their own.
            there = early.positions >= window.sinks
            ids = jnp.where(there, places.first[:, None], 0).astype(segment_ids.dtype)
            segment_ids = jnp.concatenate([ids, segment_ids], axis=1)
            positions = jnp.concatenate([early.positions.astype(positions.dtype), positions], axis=1)
        if tokens.decays is not None:
            tokens = tokens._replace(decays=jnp.where(segment_ids[..., None] > 0, tokens.decays, 0))
        return cls(
            window=window,
            queries=cut(queries, size),
            tokens=jax.tree.map(lambda part: cut(part, size, front), tokens),
            segment_ids=cut(segment_ids, size, front),
            positions=cut(positions, size, front),
            query_segment_ids=cut(places.owners, size),
            first=places.first,
            early_sinks=None if early is None else early.sinks,
            before=before,
            length=queries.shape[1],
            simple=simple,
        )

    def _beside(self, chunks: Array) -> Array:
        """Each chunk behind the `m` before it, `[B, n, (m + 1) c, ...]`."""
        count = self.queries.shape[1]
        return jnp.concatenate([chunks[:, at : at + count] for at in range(self.before + 1)], axis=2)

    @property
    def key_positions(self) -> Int[Array, "#B n S"]:
        """Positions of the tokens that each chunk's queries are scored against, sinks first."""
        beside = self._beside(self.positions)
        if not self.window.sinks:
            return beside
        slots = jnp.arange(self.window.sinks, dtype=beside.dtype)
        return jnp.concatenate([jnp.broadcast_to(slots, (*beside.shape[:2], slots.size)), beside], axis=2)

    @property
    def query_positions(self) -> Int[Array, "#B n c"]:
        """Positions of the queries."""
        return self.positions[:, self.before :]

    def pairs(self, bias: Array | None = None, *, counts_near: bool = False) -> Pairs:
        """The pairs of each chunk's queries `[B, n, c, ...]` and the tokens beside it, sinks first.

        Args:
            bias: added to the scores of near pairs, `[B, n, K, R, c, S]`.
            counts_near: whether near pairs count as far ones too.
        """
        tokens, clock = jax.tree.map(self._beside, self.tokens), self._clock
        together = _joint(self.query_segment_ids, self._beside(self.segment_ids))
        if self.window.sinks:
            keys, values, mask = self._sinks()
            keys, values = (jnp.concatenate(each, axis=2) for each in ((keys, tokens.keys), (values, tokens.values)))
            tokens = WindowNodes(keys, values, None)
            together = _side_by_side(self.reads_memory[..., None] & mask[..., None, :], together)
            room = ((0, 0), (0, 0), (self.window.sinks, 0), (0, 0))
            clock = None if clock is None else SplitSums(*(jnp.pad(part, room) for part in clock))
        masks = self.window.masks(self.query_positions, self.key_positions, together)
        # Where groups are chunks, all tokens beside a chunk are near.
        if self.simple and self.window.tokens is None:
            masks = masks._replace(far=None)
        masks = masks.with_near_among_far() if counts_near else masks
        factors = None
        if clock is not None and masks.far is not None:
            factors = between(SplitSums(*(part[:, :, -self.window.chunk :] for part in clock)), clock, masks.far)
        return Pairs(tokens._replace(decays=None), masks, factors, bias)

    @property
    def _clock(self) -> SplitSums | None:
        """Sums `[B, n, (m + 1) c, K]` of the logarithms of decay over the tokens beside a chunk; None without decay."""
        if self.tokens.decays is None:
            return None
        return SplitSums(*(jnp.cumsum(self._beside(part), axis=2) for part in parts_of(self.tokens.decays)))

    @property
    def _carried(self) -> Array:
        return carried_segment_ids(self.segment_ids, self.first)

    @property
    def _held(self) -> Array:
        """The document `[B, n]` of the memory before the tokens beside each chunk."""
        return jnp.concatenate([self.first[:, None], self._carried[:, :-1]], axis=1)[:, : self.queries.shape[1]]

    @property
    def reads_memory(self) -> Bool[Array, "#B #n #c"]:
        """Mask of the queries that belong to the document of the memory before the tokens beside their chunk."""
        if self.simple:
            return jnp.ones((1, 1, 1), bool)
        return self.query_segment_ids == self._held[..., None]

    def _sinks(self) -> Sinks:
        """Sinks `[B, n, S, ...]` of that document, as far as they lie before the tokens beside each chunk.

        A document that begins among these tokens has its sinks there. Tokens of a document lie side by side, so that
        one that is there says where the first one lies.
        """
        count, size, batch = self.queries.shape[1], self.window.chunk, self.queries.shape[0]
        slots = jnp.arange(self.window.sinks)
        ids, positions = (part.reshape(part.shape[0], -1) for part in (self.segment_ids, self.positions))
        last = jax.lax.cummax(jnp.where(ids > 0, jnp.arange(ids.shape[1]), -1), axis=1)[:, size - 1 :: size]
        last = jnp.pad(last, ((0, 0), (1, 0)), constant_values=-1)[:, :count]
        begin = last - jnp.take_along_axis(positions, jnp.maximum(last, 0), axis=1)
        at = begin[..., None] + slots
        flat = jnp.clip(at, 0, ids.shape[1] - 1).reshape(ids.shape[0], -1)
        owners = jnp.take_along_axis(ids, flat, axis=1).reshape(at.shape)
        mask = (at >= 0) & (at <= last[..., None]) & (owners == self._held[..., None])
        index, rows = flat.reshape(at.shape), [part.reshape(batch, -1, *part.shape[3:]) for part in self.tokens[:2]]
        if (early := self.early_sinks) is not None:
            rows = [
                jnp.concatenate([old.astype(new.dtype), new], axis=1) for old, new in zip(early, rows, strict=False)
            ]
            index = jnp.where(mask, index + slots.size, slots)
            mask |= (self._held == self.first[:, None])[..., None] & early.mask[:, None]
        index = jnp.broadcast_to(index, (batch, count, slots.size)).reshape(batch, -1, 1, 1)
        keys, values = (
            jnp.take_along_axis(part, index, axis=1).reshape(batch, count, slots.size, *part.shape[2:]) for part in rows
        )
        return Sinks(keys, values, mask)

    def read(self, before: Array, recall: Callable[[Array, Array], Array]) -> Float[Array, "B n c K R E"]:
        """Sums that queries read, by `recall(queries, memory)`, from the memory before what lies beside their chunk."""
        read = recall(self.queries, before)
        if (clock := self._clock) is not None:
            read = read * jnp.exp(clock.total[:, :, -self.window.chunk :])[..., None, None].astype(read.dtype)
        return jnp.where(self.reads_memory[..., None, None, None], read, 0)

    def memories(self, initial: Array, fold: Fold, *, whole: bool) -> tuple[Array, Array | None]:
        """The memory `[B, n, K, M, E]` before the tokens beside each chunk and, if `whole`, the one after the rows.

        Each is decayed up to the last token in it. Tokens in the window of the query after the row are left out.
        """
        count = self.queries.shape[1]
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
        if self.window.sinks:
            included &= self.positions >= self.window.sinks

        def scan(initial: Array, begin: int, end: int | None) -> tuple[Array, Array]:
            tokens = jax.tree.map(lambda part: part[:, begin:end], self.tokens)
            kept = None if keep is None else keep[:, begin:end]
            return _scan(initial, tokens, included[:, begin:end], kept, fold)

        before, after = scan(initial, 0, count - 1)
        before = jnp.concatenate([before, after[:, None]], axis=1)
        # What nothing reads is not computed: the last chunks are added up apart.
        return before, scan(after, count - 1, None)[1] if whole else None

    def chunks(self, rows: Array) -> Array:
        """Rows `[B, T, ...]` cut up like the queries."""
        return cut(rows, self.window.chunk)

    def flatten(self, outputs: Array) -> Array:
        """Chunks of outputs back to rows `[B, T, K, R, E]`."""
        batch, count, size = outputs.shape[:3]
        return outputs.reshape(batch, count * size, *outputs.shape[3:])[:, : self.length]


def early_mask(position: Int[Array, " B"], sinks: int) -> Bool[Array, "B S"]:
    """Slots of sinks in use when `position` tokens have been consumed."""
    return jnp.arange(sinks) < position[:, None]


def first_position(segment_ids: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Int[Array, " B"]:
    """The position of each row's first real token."""
    first = jnp.argmax(segment_ids > 0, axis=1)
    return jnp.take_along_axis(positions, first[:, None], axis=1)[:, 0]


def _joint(queries: Int[Array, "#B n c"], keys: Int[Array, "#B n S"]) -> Bool[Array, "#B n c S"]:
    """Pairs of one document."""
    return (queries[..., None] == keys[..., None, :]) & (keys > 0)[..., None, :]


def _side_by_side(one: Bool[Array, "#B n #c S"], other: Bool[Array, "#B n c W"]) -> Bool[Array, "#B n c S_W"]:
    lead = jnp.broadcast_shapes(one.shape[:-1], other.shape[:-1])
    return jnp.concatenate([jnp.broadcast_to(each, (*lead, each.shape[-1])) for each in (one, other)], axis=-1)


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
        own = parts_of(jnp.where(included[..., None], tokens.decays, 0))
        after = SplitSums(*(jnp.cumsum(part[:, :, ::-1], axis=2)[:, :, ::-1] for part in own))
        since = SplitSums(*(total - part for total, part in zip(after, own, strict=True)))
        factors, across = included[..., None] * jnp.exp(since.total), jnp.exp(after.total[:, :, 0])

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
