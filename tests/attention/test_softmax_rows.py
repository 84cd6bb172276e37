"""Softmax over whole rows, as CPUs compute it, against sums in float64 and the gradient of JAX's own attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lin_jax.attention.full import masked_softmax
from lin_jax.attention.softmax_rows import softmax_rows, suits_rows
from pallas_kernels.implementations import compiling_for
from pallas_kernels.types import QKV

ROWS, LENGTH, HEADS, KV_HEADS, SIZE = 2, 150, 4, 2, 8


def case(value_size=SIZE):
    """Queries, keys, values, a mask of two documents, and a bias."""
    rng = np.random.default_rng(0)
    shapes = ((HEADS, SIZE), (KV_HEADS, SIZE), (KV_HEADS, value_size))
    qkv = QKV(*(jnp.asarray(rng.standard_normal((ROWS, LENGTH, *shape)), jnp.float32) for shape in shapes))
    segment_ids = 1 + (np.arange(LENGTH) >= np.array([[20], [100]]))
    bias = jnp.asarray(rng.standard_normal((1, HEADS, LENGTH, LENGTH)), jnp.float32)
    return qkv, jnp.asarray(segment_ids[:, :, None] == segment_ids[:, None, :]), bias


def expected(qkv, mask, bias, causal):
    queries, keys, values = (np.asarray(part, np.float64) for part in qkv)
    found = np.zeros((ROWS, LENGTH, HEADS, values.shape[-1]))
    for row in range(ROWS):
        for head in range(HEADS):
            shared = head // (HEADS // KV_HEADS)
            scores = 0.3 * queries[row, :, head] @ keys[row, :, shared].T + np.asarray(bias)[0, head]
            seen = np.asarray(mask[row]) & (np.tri(LENGTH, dtype=bool) if causal else True)
            weights = np.where(seen, np.exp(scores), 0)
            found[row, :, head] = weights @ values[row, :, shared] / weights.sum(axis=1, keepdims=True)
    return found


@pytest.mark.parametrize("causal", [True, False])
def test_outputs_are_sums_in_float64(causal):
    qkv, mask, bias = case(value_size=5)
    found = softmax_rows(qkv, mask, bias, 0.3, causal=causal)
    np.testing.assert_allclose(found, expected(qkv, mask, bias, causal), rtol=1e-5, atol=1e-5)


def test_gradient_is_that_of_masked_softmax():
    qkv, mask, bias = case()
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((ROWS, LENGTH, HEADS, SIZE)), jnp.float32)

    def ours(qkv, bias):
        return jnp.sum(weights * softmax_rows(qkv, mask, bias, 0.3, causal=True))

    def plain(qkv, bias):
        return jnp.sum(weights * masked_softmax(*qkv, mask & jnp.tri(LENGTH, dtype=bool), bias, 0.3))

    found, wanted = (jax.jit(jax.grad(loss, (0, 1)))(qkv, bias) for loss in (ours, plain))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_query_without_pairs_has_the_gradient_of_a_mean():
    qkv, mask, _ = case()
    mask = mask.at[0, 7].set(False)
    weights = jnp.asarray(np.random.default_rng(2).standard_normal((ROWS, LENGTH, HEADS, SIZE)), jnp.float32)

    def loss(outputs, qkv):
        return jnp.sum(weights * outputs(qkv))

    ways = (lambda q: softmax_rows(q, mask, None, 0.3, causal=False), lambda q: masked_softmax(*q, mask, None, 0.3))
    found, wanted = (jax.jit(jax.grad(loss, 1), static_argnums=0)(way, qkv) for way in ways)
    np.testing.assert_array_equal(found.queries[0, 7], 0)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_large_scores_stay_in_range_and_no_pair_is_the_mean():
    qkv, mask, _ = case()
    large = qkv._replace(queries=1e4 * qkv.queries)
    assert np.isfinite(softmax_rows(large, mask, None, 1.0, causal=True)).all()
    nothing = softmax_rows(qkv, jnp.zeros_like(mask), None, 1.0, causal=False)
    mean = np.repeat(np.mean(qkv.values, axis=1, keepdims=True), HEADS // KV_HEADS, axis=2)
    np.testing.assert_allclose(nothing, np.broadcast_to(mean, nothing.shape), rtol=1e-4, atol=1e-5)


def test_only_cpus_and_float32():
    qkv, _, _ = case()
    assert suits_rows(qkv)
    assert not suits_rows(QKV(*(part.astype(jnp.bfloat16) for part in qkv)))
    with compiling_for("tpu"):
        assert not suits_rows(qkv)
