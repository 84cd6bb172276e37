"""Softmax over a long cache of keys and values, written for XLA's compiler for CPUs: block by block of what is in use.

The usual way joins the cache and the new tokens' pairs, and multiplies with all of its slots, used or not: several
copies of the cache for each token. Here, slices of the cache are read where they lie, up to the last one in use, and
outputs and sums of a slice are added to those before it with the largest score so far as their common scale (Milakov
and Gimelshein 2018; Dao et al. 2022). A short cache is not worth a loop, and accelerators have other costs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.implementations import target_platform
from pallas_kernels.pairs import merge_heads, split_heads
from pallas_kernels.types import QKV

# Slots of a block, and the least number of slots for which blocks are the faster way.
BLOCK, LEAST = 512, 2048


class _Sums(NamedTuple):
    """Largest score `[B, K, R, T, 1]`, and by its scale the weights' sum, and that of weighted values `[.., T, E]`."""

    largest: Array
    weights: Array
    values: Array


def suits_blocks(qkv: QKV) -> bool:
    """True where `softmax_of_cache` is the faster way for queries, and keys and values of a cache."""
    float32 = all(part.dtype == jnp.float32 for part in qkv)
    return target_platform() == "cpu" and float32 and qkv.keys.shape[1] >= LEAST


def softmax_of_cache(
    qkv: QKV,
    used: Int[Array, "B T"],
    scale: float,
    nodes: tuple[Float[Array, "B N K D"], Float[Array, "B N K E"], Bool[Array, "B T N"]] | None = None,
    *,
    block: int = BLOCK,
) -> Float[Array, "B T H E"]:
    """Outputs over the first slots of a cache, and over nodes that are not in it yet.

    Args:
        qkv: queries `[B, T, H, D]`, the cache's keys `[B, C, K, D]` and values `[B, C, K, E]`; H is a multiple of K.
        used: `[B, T]` slots that each query sees; at least one of them where there are no nodes.
        scale: factor of the scores.
        nodes: keys and values of the nodes, and the mask of those that each query sees, at least one of them; or None.
        block: slots of a block.
    """
    queries, keys, values = qkv
    capacity, kv_heads = keys.shape[1:3]
    block = min(block, capacity)
    queries = jnp.moveaxis(split_heads(queries * scale, kv_heads), 1, 3)
    lead = queries.shape[:-1]
    sums = _Sums(
        jnp.full((*lead, 1), jnp.finfo(queries.dtype).min, queries.dtype),
        jnp.zeros((*lead, 1), queries.dtype),
        jnp.zeros((*lead, values.shape[-1]), queries.dtype),
    )
    if nodes is not None:
        sums = _added(sums, queries, *nodes)

    def add(number: Int[Array, ""], sums: _Sums) -> _Sums:
        # The last block reaches back into the one before, whose slots it leaves out.
        begin = jnp.minimum(number * block, capacity - block)
        slots = begin + jnp.arange(block)
        mask = (slots >= number * block) & (slots < used[..., None])
        own_keys, own_values = (jax.lax.dynamic_slice_in_dim(each, begin, block, axis=1) for each in (keys, values))
        return _added(sums, queries, own_keys, own_values, mask)

    count = (jnp.max(used) + block - 1) // block
    sums = jax.lax.fori_loop(0, count, add, sums)
    return merge_heads(jnp.moveaxis(sums.values / sums.weights, 3, 1))


def _added(
    sums: _Sums,
    queries: Float[Array, "B K R T D"],
    keys: Float[Array, "B S K D"],
    values: Float[Array, "B S K E"],
    mask: Bool[Array, "B T S"],
) -> _Sums:
    """The sums with those of some more pairs."""
    scores = jnp.einsum("bkrtd,bskd->bkrts", queries, keys)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)
    largest = jnp.maximum(sums.largest, jnp.max(scores, axis=-1, keepdims=True))
    # A masked score beside a real one has the weight 0.
    weights, faded = jnp.exp(scores - largest), jnp.exp(sums.largest - largest)
    return _Sums(
        largest,
        faded * sums.weights + jnp.sum(weights, axis=-1, keepdims=True),
        faded * sums.values + jnp.einsum("bkrts,bske->bkrte", weights, values),
    )
