"""Positions and segment ids of the tokens of a batch: each token's place in its document, and the document's number."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels.chunks import first_segment_id


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layout:
    """Positions and segment ids of the tokens of a batch.

    Attributes:
        positions: `[B, T]` position of each token, counted from the start of its own document (and onward from
            the state, where one is given).
        segment_ids: `[B, T]` number of the document a token belongs to; equal numbers stand side by side, 0 is padding.
        aligned: whether every row is one document that begins at position 0, so that groups are slices of the row.
        present: `[B, T]` tokens that may be attended to; None means all that belong to a document. Tokens that are not
            present still have positions and outputs, which nothing else depends on.
        continued: whether aligned rows are pieces of longer ones, from the end of a group on: what came before them is
            in a state, positions count it, and groups are slices of the row nevertheless. No state comes after them.
    """

    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    aligned: bool = field(default=False, metadata={"static": True})
    present: Bool[Array, "B T"] | None = None
    continued: bool = field(default=False, metadata={"static": True})

    @property
    def valid(self) -> Bool[Array, "B T"]:
        """Mask of the real tokens, not padding: those that may be attended to."""
        return self.segment_ids > 0 if self.present is None else self.present

    @property
    def pairs(self) -> Bool[Array, "#B T T"]:
        """Mask of the (query, key) pairs of one document whose key is present."""
        if self.aligned:
            return jnp.broadcast_to(self.valid[:, None, :], (*self.segment_ids.shape, self.segment_ids.shape[1]))
        return (self.segment_ids[:, :, None] == self.segment_ids[:, None, :]) & self.valid[:, None, :]

    @property
    def lengths(self) -> Int[Array, " B"]:
        """Number of real tokens of each row."""
        return jnp.sum(self.valid, axis=1)


def whole_rows(batch: int, length: int) -> Layout:
    """The layout of rows that are one document each, without padding, from position 0."""
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    return Layout(positions, jnp.ones_like(positions), aligned=True)


def masked_rows(mask: Bool[Array, "B T"] | Int[Array, "B T"]) -> Layout:
    """The layout of rows that are one document each, of which the mask leaves tokens out.

    Positions count the whole row, masked tokens included, as in Hugging Face's encoders.
    """
    whole = whole_rows(*mask.shape)
    return Layout(whole.positions, whole.segment_ids, aligned=True, present=mask.astype(bool))


def single_rows(shape: tuple[int, ...], mask: Bool[Array, "B T"] | Int[Array, "B T"] | None) -> Layout:
    """The layout of rows `[B, T]` that are one document each, whole, or with a mask as in `masked_rows`."""
    return whole_rows(*shape) if mask is None else masked_rows(mask)


def packed_rows(segment_ids: Int[Array, "B T"], start: Int[Array, " B"] | None = None) -> Layout:
    """The layout of rows that hold several documents or padding.

    Args:
        segment_ids: `[B, T]` numbers of documents; equal numbers stand side by side, 0 is padding.
        start: `[B]` how many tokens of the first document came before this row; None means none.
    """
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    previous = jnp.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]
    begins = jax.lax.cummax(jnp.where(segment_ids != previous, index, 0), axis=1)
    positions = index - begins
    if start is not None:
        continues = segment_ids == first_segment_id(segment_ids)[:, None]
        positions = positions + jnp.where(continues, start[:, None], 0)
    return Layout(jnp.where(segment_ids > 0, positions, 0), segment_ids)


def padded_rows(lengths: Int[Array, " B"], width: int, start: Int[Array, " B"]) -> Layout:
    """The layout of rows of one document each that go on from `start` and are padded on the right to `width`."""
    segment_ids = (jnp.arange(width) < lengths[:, None]).astype(jnp.int32)
    return packed_rows(segment_ids, start)
