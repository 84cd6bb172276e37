"""Attention over a window and a memory in plain XLA: all chunks of rows side by side, memories before them by a scan.

Autodiff gives the gradients.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.linear_attention.problem import Memory
from pallas_kernels.pairs import merge_heads, split_heads, weighted_values
from pallas_kernels.precision import accumulation_dtype
from pallas_kernels.windowed_attention.problem import AttentionWindowPlan, WindowedProblem
from pallas_kernels.windows.features import (
    ExponentialMap,
    Features,
    HedgehogMap,
    feature_fold,
    feature_recall,
    feature_scores,
)
from pallas_kernels.windows.normaliser import extended, normalised
from pallas_kernels.windows.rows import Before, TokenPlaces, WindowedRows, WindowNodes
from pallas_kernels.windows.window import AttentionWindow


def forward(problem: WindowedProblem, plan: AttentionWindowPlan) -> tuple[Float[Array, "B T H E"], Memory]:
    """Outputs, and the memory after the rows in float32 or better; weights are the map's own."""
    batch, length, kv_heads, _ = problem.keys.shape
    window = AttentionWindow(plan.tokens, plan.group, plan.groups, plan.sinks)
    features, values, packed = _features(problem, plan), problem.values, problem.packed
    keys, places, early = problem.keys, TokenPlaces.whole(length), None
    if packed is not None:
        there = (packed.segment_ids > 0)[..., None, None]
        keys, values = (jnp.where(there, each, 0) for each in (keys, values))
        places = TokenPlaces(packed.segment_ids, packed.segment_ids, packed.positions, packed.first, aligned=False)
    shape = batch, kv_heads, problem.features * (2 if plan.features == "hedgehog" else 1), values.shape[3] + 1
    initial = jnp.zeros(shape, accumulation_dtype(values.dtype))
    if (prior := problem.prior) is not None:
        initial = jnp.concatenate([prior.memory.values, prior.memory.keys[..., None]], axis=-1).astype(initial.dtype)
        prior = prior.of_length(window.chunks_before(aligned=False) * window.chunk)
        tokens = WindowNodes(prior.keys, prior.values, prior.log_decays)
        early = Before(tokens, prior.positions, None if packed is None else prior.sinks(packed))
    queries = split_heads(problem.queries, kv_heads)
    rows = WindowedRows.of(window, queries, WindowNodes(keys, values, problem.log_decays), places, early)

    def fold(keys: Array, values: Array, factors: Array | None) -> Array:
        summed = extended(values)
        return feature_fold(
            features, keys, summed if factors is None else summed * factors[..., None].astype(summed.dtype)
        )

    before, after = rows.memories(initial, fold, whole=packed is not None)
    far = rows.read(before, lambda queries, memory: feature_recall(features, queries, memory))
    pairs = rows.pairs()
    if pairs.masks.far is not None:
        weights = feature_scores(features, rows.queries, pairs.tokens.keys)
        weights = jnp.where(pairs.masks.far[..., None, None, :, :], weights, 0)
        weights = weights if pairs.factors is None else weights * pairs.factors.astype(weights.dtype)
        far = far + weighted_values(weights, extended(pairs.tokens.values))
    balance = problem.balance.reshape(kv_heads, -1)
    log_scale = features.log_scale(rows.queries) + balance.astype(far.dtype)
    outputs = rows.flatten(normalised(rows.queries, pairs, far, log_scale, plan.scale))
    after = jnp.zeros_like(initial) if after is None else after
    return merge_heads(outputs).astype(values.dtype), Memory(after[..., :-1], after[..., -1])


def _features(problem: WindowedProblem, plan: AttentionWindowPlan) -> Features:
    weights, kv_heads = problem.weights, problem.keys.shape[2]
    queries = weights.queries.reshape(kv_heads, -1, *weights.queries.shape[1:])
    if plan.features == "hedgehog":
        return HedgehogMap(queries, weights.keys)
    bias = None if weights.query_bias is None else weights.query_bias.reshape(kv_heads, -1, weights.keys.shape[1])
    return ExponentialMap(queries, weights.keys, bias, weights.key_bias, plan.scale)
