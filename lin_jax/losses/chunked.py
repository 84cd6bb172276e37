"""Sums over the tokens of rows, in chunks of tokens, so that their logits are never whole in memory."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def sums_in_chunks(sums: Callable[[Any], Any], rows: Any, *, vocabulary: int, max_logits: int) -> Any:
    """Computes `sums(rows)`, added up over chunks of every row's tokens where a device's logits would be too many.

    Parts are made again in the backward pass.

    Args:
        sums: makes the logits of rows, and a tree of sums over their tokens, to which rows of zeros add nothing.
        rows: a tree of arrays `[B, T, ...]`.
        vocabulary: logits of a token.
        max_logits: about how many logits a device may hold.
    """
    batch, length = jax.tree.leaves(rows)[0].shape[:2]
    devices = math.prod(jax.sharding.get_abstract_mesh().shape.values())
    count = min(-(-batch * length * vocabulary // (max_logits * devices)), length)
    if count <= 1:
        return sums(rows)

    def add(totals: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, totals, jax.checkpoint(sums)(part)), None

    parts = jax.tree.map(partial(_parts, count=count), rows)
    shapes = jax.eval_shape(sums, jax.tree.map(lambda part: part[0], parts))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, parts)[0]


def _parts(rows: Array, count: int) -> Array:
    """Rows `[B, T, ...]` as `[count, B, T / count, ...]`, filled up with zeros at the end.

    A part takes tokens from all over a row, so that every device has some of those that lie along the mesh.
    """
    length = -(-rows.shape[1] // count)
    padded = jnp.pad(rows, ((0, 0), (0, count * length - rows.shape[1]), *((0, 0),) * (rows.ndim - 2)))
    return jnp.moveaxis(padded.reshape(rows.shape[0], length, count, *rows.shape[2:]), 2, 0)
