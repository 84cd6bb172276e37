"""Verification by a window and a memory, for the nodes of one row and one head: plain functions of small arrays.

Ring, sinks and nodes are a block of N queries behind a window of C + S rows, as `windowed_attention` has it; the memory
lies with its features in the last axis and the normaliser's row behind the values': `[E + 1, M]`.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.products import matmul, memory_matmul
from pallas_kernels.window_verify.problem import FAR, NEAR
from pallas_kernels.windowed_attention.blocks import DecayClock, MappedRows, block_outputs, block_weights, features_of
from pallas_kernels.windowed_attention.problem import AttentionWindowPlan, WindowedPlan
from pallas_kernels.windows.clock import SplitSums


class NodePairs(NamedTuple):
    """Masks of the nodes' pairs.

    Attributes:
        near: `[N, C + S + N]` pairs whose key is in the query's window, or a sink.
        far: `[N, C + S + N]` pairs whose key is before it, though it is not in the memory yet.
        reads: `[1, 1]` true: every node reads the memory.
    """

    near: Bool[Array, "N W"]
    far: Bool[Array, "N W"]
    reads: Bool[Array, "1 1"]


def node_features(
    rows: Float[Array, "n D"],
    weight: Float[Array, "m D"],
    bias: Float[Array, "1 m"] | None,
    window: AttentionWindowPlan,
    *,
    queries: bool,
) -> MappedRows:
    """Features of rows of one head, from the map's weights as a model has them."""
    product = matmul if weight.dtype == rows.dtype else memory_matmul
    exponents = product(rows, weight, (1, 1))
    if window.features == "hedgehog":
        exponents = jnp.concatenate([exponents, -exponents], axis=1)
    else:
        exponents = math.sqrt(window.scale) * exponents
    return features_of(exponents if bias is None else exponents + bias, rows, window, queries=queries)


def node_outputs(
    queries: Float[Array, "N D"],
    keys: Float[Array, "W D"],
    values: Float[Array, "W E"],
    asked: MappedRows,
    features: Float[Array, "W M"],
    memory: Float[Array, "E_1 M"],
    balance: Array,
    clock: Float[Array, "W 1"] | None,
    pairs: Int[Array, "N W"],
    window: AttentionWindowPlan,
) -> Float[Array, "N E"]:
    """Outputs of the nodes for one query head; keys, values and the clock are the ring's, the sinks' and the nodes'."""
    nodes, size = queries.shape[0], values.shape[1]
    plan = WindowedPlan(keys.shape[0] - nodes, nodes, nodes, window)
    masks = NodePairs(pairs == NEAR, pairs == FAR, jnp.ones((1, 1), bool))
    ages = None
    if clock is not None:
        ages = DecayClock(SplitSums.of(clock[plan.before :]), SplitSums.of(clock.T))
    weights = block_weights(queries, keys, asked, features, memory[size:], balance, ages, masks, plan)
    return block_outputs(weights, asked, values, memory[:size])
