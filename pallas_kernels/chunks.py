"""Rows cut into chunks, and the document that a memory is of along a packed row."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def cut(x: Array, size: int, front: int = 0) -> Array:
    """Rows `[B, T, ...]` as chunks `[B, n, size, ...]`, with zeros before them and to fill the last one up."""
    back = -(x.shape[1] + front) % size
    padded = jnp.pad(x, ((0, 0), (front, back), *((0, 0),) * (x.ndim - 2)))
    return padded.reshape(x.shape[0], -1, size, *x.shape[2:])


def first_segment_id(segment_ids: Int[Array, "B T"]) -> Int[Array, " B"]:
    """The segment id of each row's first real token; 1 in a row of padding."""
    first = jnp.argmax(segment_ids > 0, axis=1)
    number = jnp.take_along_axis(segment_ids, first[:, None], axis=1)[:, 0]
    return jnp.where(number > 0, number, 1)


def carried_segment_ids(segment_ids: Int[Array, "B n G"], first: Int[Array, " B"]) -> Int[Array, "B n"]:
    """The segment id of the memory's document after each chunk: that of the last real token so far."""
    batch, chunks, size = segment_ids.shape
    flat = segment_ids.reshape(batch, chunks * size)
    index = jax.lax.cummax(jnp.where(flat > 0, jnp.arange(flat.shape[1]), -1), axis=1)[:, size - 1 :: size]
    found = jnp.take_along_axis(flat, jnp.maximum(index, 0), axis=1)
    return jnp.where(index >= 0, found, first[:, None])
