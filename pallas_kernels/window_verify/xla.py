"""Verification by a window and a memory in plain XLA."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.precision import accumulation_dtype
from pallas_kernels.window_verify.blocks import node_features, node_outputs
from pallas_kernels.window_verify.problem import WindowVerifyProblem, node_pairs, pair_clock
from pallas_kernels.windowed_attention.problem import AttentionWindowPlan


def verify(problem: WindowVerifyProblem, window: AttentionWindowPlan) -> Float[Array, "B N H E"]:
    """Outputs of the nodes."""
    state, weights = problem.state, problem.weights
    batch, nodes, heads, _ = problem.queries.shape
    kv_heads = problem.keys.shape[2]
    ring = state.keys, state.values
    keys, values = (
        jnp.concatenate([old.astype(new.dtype), new], axis=1)
        for old, new in zip(ring, problem.sinks_and_nodes(), strict=True)
    )
    clock = pair_clock(problem, window)
    memory = jnp.swapaxes(state.memory, 2, 3).astype(accumulation_dtype(values.dtype))

    def of_heads(array: Array) -> Array:
        """`[K, R, ...]` from `[H, ...]`."""
        return array.reshape(kv_heads, -1, *array.shape[1:])

    bias = None if weights.query_bias is None else of_heads(weights.query_bias)
    asked = of_heads(weights.queries), bias, of_heads(problem.balance)
    held = weights.keys, weights.key_bias

    def row(queries: Array, keys: Array, values: Array, memory: Array, clock: Array | None, pairs: Array) -> Array:
        return jax.vmap(partial(_head, pairs=pairs, window=window), in_axes=(1, 1, 1, 0, 0, 0, 0), out_axes=1)(
            queries, keys, values, memory, clock, asked, held
        )

    queries = problem.queries.reshape(batch, nodes, kv_heads, heads // kv_heads, -1)
    outputs = jax.vmap(row)(queries, keys, values, memory, clock, node_pairs(problem, window))
    return outputs.reshape(batch, nodes, heads, -1).astype(problem.values.dtype)


def _head(
    queries: Float[Array, "N R D"],
    keys: Float[Array, "W D"],
    values: Float[Array, "W E"],
    memory: Float[Array, "E_1 M"],
    clock: Float[Array, " W"] | None,
    asked: tuple[Array, Array | None, Array],
    held: tuple[Array, Array | None],
    *,
    pairs: Array,
    window: AttentionWindowPlan,
) -> Float[Array, "N R E"]:
    """Outputs of the query heads that share a key/value head."""
    features = node_features(keys, held[0], _row(held[1]), window, queries=False).rounded
    upright = None if clock is None else clock[:, None]

    def own(queries: Array, weight: Array, bias: Array | None, balance: Array) -> Array:
        mapped = node_features(queries, weight, _row(bias), window, queries=True)
        return node_outputs(queries, keys, values, mapped, features, memory, balance, upright, pairs, window)

    return jax.vmap(own, in_axes=(1, 0, 0, 0), out_axes=1)(queries, *asked)


def _row(bias: Array | None) -> Array | None:
    return None if bias is None else bias[None]
