"""Softmax over whole rows, written for XLA's compiler for CPUs, forward and backward.

The usual way divides every weight by its row's sum; its gradient then reads all pairs four times, in loops that this
compiler runs slowly. Here outputs are divided instead, `o = (sum_s e_s v_s) / sum_s e_s`, so that the gradient of the
pairs is one product and one loop: `dL/de_s = do·v_s / sum - do·o / sum` needs no sum over pairs. Causal rows are
computed in blocks of queries, each over the keys up to its end. Accelerators have kernels for this, or other costs.
"""

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
    kv_heads, length = keys.shape[2], queries.shape[1]
    # Heads first: these are the copies that the products would make, and each is made once.
    queries = jnp.moveaxis(split_heads(queries * scale, kv_heads), 1, 3)
    keys, values = jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2)
    if bias is not None:
        bias = bias.reshape(bias.shape[0], kv_heads, -1, *bias.shape[2:])
    size = max(-(-length // _MOST_BLOCKS), _LEAST_QUERIES) if causal else length
    outputs = []
    for begin in range(0, length, size):
        end = min(begin + size, length)
        seen = end if causal else keys.shape[2]
        pairs = None if mask is None else mask[:, begin:end, :seen]
        if causal:
            order = jnp.tri(end - begin, seen, begin, dtype=bool)
            pairs = order[None] if pairs is None else pairs & order
        added = None if bias is None else bias[:, :, :, begin:end, :seen]
        outputs.append(_block(queries[:, :, :, begin:end], keys[:, :, :seen], values[:, :, :seen], pairs, added))
    return merge_heads(jnp.moveaxis(jnp.concatenate(outputs, axis=3), 3, 1))


def _block(
    queries: Float[Array, "B K R T D"],
    keys: Float[Array, "B K S D"],
    values: Float[Array, "B K S E"],
    mask: Bool[Array, "#B T S"] | None,
    bias: Float[Array, "#B K R T S"] | None,
) -> Float[Array, "B K R T E"]:
    scores = jnp.einsum("bkrtd,bksd->bkrts", queries, keys)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)
    # The largest score only keeps exponentials in range: outputs do not depend on it.
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    return jnp.einsum("bkrts,bkse->bkrte", weights, values) / jnp.sum(weights, axis=-1, keepdims=True)
