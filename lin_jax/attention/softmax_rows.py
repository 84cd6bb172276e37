"""Softmax over whole rows, written for XLA's compiler for CPUs, forward and backward.

The usual way divides every weight by its row's sum; its gradient then reads all pairs four times, in loops that this
compiler runs slowly. Here outputs are divided instead, `o = (sum_s e_s v_s) / sum_s e_s`, so that the gradient of the
pairs is one product and one loop: `dL/de_s = do·v_s / sum - do·o / sum` needs no sum over pairs. Causal rows are
computed in blocks of queries, each over the keys up to its end. The gradient is written by hand: derived, it makes
copies of slices, and reads all pairs once more for `do·o`. Accelerators have kernels for this, or other costs.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.implementations import target_platform
from pallas_kernels.pairs import merge_heads, split_heads
from pallas_kernels.types import QKV

# Blocks of causal rows, and the least number of queries in one: more of them skip more pairs, and compile longer.
_MOST_BLOCKS, _LEAST_QUERIES = 4, 64


def suits_rows(qkv: QKV) -> bool:
    """True where `softmax_rows` is the faster way: on CPUs, which compute in float32."""
    return target_platform() == "cpu" and all(part.dtype == jnp.float32 for part in qkv)


def softmax_rows(
    qkv: QKV,
    mask: Bool[Array, "#B T S"] | None,
    bias: Float[Array, "#B H T S"] | None,
    scale: float,
    *,
    causal: bool,
) -> Float[Array, "B T H E"]:
    """Outputs of whole rows.

    Args:
        qkv: queries `[B, T, H, D]`, keys `[B, S, K, D]` and values `[B, S, K, E]`; H is a multiple of K.
        mask: the pairs that count; None is all. A query without any reads the mean of values.
        bias: added to the scores, or None.
        scale: factor of the scores.
        causal: leave keys out that come after the query, whatever the mask says; S is T then.
    """
    queries, keys, values = qkv
    kv_heads = keys.shape[2]
    # Heads first: these are the copies that the products would make, and each is made once.
    queries = jnp.moveaxis(split_heads(queries * scale, kv_heads), 1, 3)
    keys, values = jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2)
    if bias is not None:
        bias = bias.reshape(bias.shape[0], kv_heads, -1, *bias.shape[2:])
    outputs = _rows(queries, keys, values, mask, bias, causal)
    return merge_heads(jnp.moveaxis(outputs, 3, 1))


class _Kept(NamedTuple):
    """Residuals of the gradient: the inputs, weights of each block, their sums, and outputs."""

    queries: Float[Array, "B K R T D"]
    keys: Float[Array, "B K S D"]
    values: Float[Array, "B K S E"]
    mask: Bool[Array, "#B T S"] | None
    bias: Float[Array, "#B K R T S"] | None
    weights: tuple[Float[Array, "B K R t s"], ...]
    sums: Float[Array, "B K R T 1"]
    outputs: Float[Array, "B K R T E"]


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _rows(
    queries: Float[Array, "B K R T D"],
    keys: Float[Array, "B K S D"],
    values: Float[Array, "B K S E"],
    mask: Bool[Array, "#B T S"] | None,
    bias: Float[Array, "#B K R T S"] | None,
    causal: bool,
) -> Float[Array, "B K R T E"]:
    """Outputs of scaled queries, heads first; the gradient is written by hand."""
    return _forward(queries, keys, values, mask, bias, causal)[0]


def _forward(
    queries: Array, keys: Array, values: Array, mask: Array | None, bias: Array | None, causal: bool
) -> tuple[Float[Array, "B K R T E"], _Kept]:
    weights, sums, outputs = [], [], []
    for begin, end, seen in _blocks(queries.shape[3], keys.shape[2], causal):
        scores = jnp.einsum("bkrtd,bksd->bkrts", queries[:, :, :, begin:end], keys[:, :, :seen])
        if bias is not None:
            scores = scores + bias[:, :, :, begin:end, :seen]
        allowed = _allowed(mask, begin, end, seen, causal)
        if allowed is not None:
            scores = jnp.where(allowed, scores, jnp.finfo(scores.dtype).min)
        # The largest score only keeps exponentials in range: outputs do not depend on it.
        weights.append(jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True)))
        sums.append(jnp.sum(weights[-1], axis=-1, keepdims=True))
        outputs.append(jnp.einsum("bkrts,bkse->bkrte", weights[-1], values[:, :, :seen]))
    total = jnp.concatenate(sums, axis=3)
    output = jnp.concatenate(outputs, axis=3) / total
    return output, _Kept(queries, keys, values, mask, bias, tuple(weights), total, output)


def _backward(causal: bool, kept: _Kept, cotangent: Float[Array, "B K R T E"]) -> tuple[Any, ...]:
    queries, keys, values, mask, bias, *_ = kept
    cotangent = cotangent / kept.sums
    mean = jnp.sum(cotangent * kept.outputs, axis=-1, keepdims=True)
    blocks = _blocks(queries.shape[3], keys.shape[2], causal)
    to_queries, to_keys, to_values, to_scores = [], [], [], []
    for (begin, end, seen), weights in zip(blocks, kept.weights, strict=True):
        outer = cotangent[:, :, :, begin:end]
        scores = weights * (jnp.einsum("bkrte,bkse->bkrts", outer, values[:, :, :seen]) - mean[:, :, :, begin:end])
        allowed = None if mask is None else _allowed(mask, begin, end, seen, causal)
        if allowed is not None:
            # Of a query without any pair all weights are one, and do not depend on its scores.
            scores = jnp.where(allowed, scores, 0)
        to_queries.append(jnp.einsum("bkrts,bksd->bkrtd", scores, keys[:, :, :seen]))
        to_keys.append(_over_queries(scores, queries[:, :, :, begin:end]))
        to_values.append(_over_queries(weights, outer))
        to_scores.append(scores)
    to_bias = (
        None
        if bias is None
        else _to_shape(jnp.concatenate([_filled(each, keys.shape[2], 4) for each in to_scores], 3), bias)
    )
    totals = [sum(_filled(each, keys.shape[2], 2) for each in parts) for parts in (to_keys, to_values)]
    return jnp.concatenate(to_queries, axis=3), *totals, None, to_bias


_rows.defvjp(_forward, _backward)


def _over_queries(pairs: Float[Array, "B K R t s"], rows: Float[Array, "B K R t D"]) -> Float[Array, "B K s D"]:
    """Sums over the queries of all heads that share a key's."""
    batch, heads, _, _, keys = pairs.shape
    pairs, rows = pairs.reshape(batch, heads, -1, keys), rows.reshape(batch, heads, -1, rows.shape[4])
    # Behind the barrier pairs are copied as they are; before it, XLA computes them once more in the other order.
    pairs = jax.lax.optimization_barrier(jnp.swapaxes(pairs, 2, 3))
    return jnp.einsum("bksq,bkqd->bksd", pairs, rows)


def _blocks(length: int, keys: int, causal: bool) -> list[tuple[int, int, int]]:
    """First query of each block, that of the next one, and how many keys it may see."""
    size = max(-(-length // _MOST_BLOCKS), _LEAST_QUERIES) if causal else length
    ends = [(begin, min(begin + size, length)) for begin in range(0, length, size)]
    return [(begin, end, end if causal else keys) for begin, end in ends]


def _allowed(mask: Array | None, begin: int, end: int, seen: int, causal: bool) -> Bool[Array, "#B 1 1 t s"] | None:
    """Pairs of a block that count; None is all of them."""
    pairs = None if mask is None else mask[:, begin:end, :seen]
    if causal:
        order = jnp.tri(end - begin, seen, begin, dtype=bool)
        pairs = order[None] if pairs is None else pairs & order
    return None if pairs is None else pairs[:, None, None]


def _filled(part: Array, size: int, axis: int) -> Array:
    """A part with zeros up to a size along an axis."""
    widths = [(0, size - part.shape[axis] if each == axis else 0) for each in range(part.ndim)]
    return jnp.pad(part, widths)


def _to_shape(whole: Array, like: Array) -> Array:
    """Sums along the axes that were repeated."""
    repeated = tuple(axis for axis, size in enumerate(like.shape) if size == 1 and whole.shape[axis] != 1)
    return jnp.sum(whole, axis=repeated, keepdims=True)
