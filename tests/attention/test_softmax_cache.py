"""Softmax over a cache in blocks, against the same over all of its pairs at once."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lin_jax.attention import softmax_cache, tree_arrays
from lin_jax.attention.config import Conventions
from lin_jax.attention.full import FullAttention
from lin_jax.attention.layout import padded_rows
from lin_jax.attention.softmax_cache import softmax_of_cache
from pallas_kernels.implementations import compiling_for
from pallas_kernels.types import QKV

pytestmark = pytest.mark.usefixtures("x64")

CAPACITY, USED = 11, np.array([[7, 7, 7], [2, 2, 2]])


@pytest.fixture
def numbers(x64):
    """Queries of three nodes, a cache of eleven slots, and the nodes' keys and values, for two texts of two heads."""
    rng = np.random.default_rng(0)
    shapes = ((2, 3, 4, 8), (2, CAPACITY, 2, 8), (2, CAPACITY, 2, 6), (2, 3, 2, 8), (2, 3, 2, 6))
    return [jnp.asarray(rng.standard_normal(shape), jnp.float64) for shape in shapes]


def expected(queries, keys, values, mask):
    """Each output by itself, in loops."""
    outputs = np.zeros((*queries.shape[:3], values.shape[-1]))
    for row, query, head in np.ndindex(queries.shape[:3]):
        seen = np.flatnonzero(mask[row, query])
        scores = keys[row, seen, head // 2] @ queries[row, query, head] * 0.3
        weights = np.exp(scores - scores.max())
        outputs[row, query, head] = weights @ values[row, seen, head // 2] / weights.sum()
    return outputs


@pytest.mark.parametrize("block", [4, 11])
def test_blocks(numbers, block):
    """Blocks that end inside the cache or with it, with nodes and without, also where the cache holds nothing."""
    queries, keys, values, node_keys, node_values = numbers
    found_in = jax.jit(partial(softmax_of_cache, scale=0.3, block=block))
    ancestors = np.broadcast_to(np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]], bool), (2, 3, 3))
    cached = np.arange(CAPACITY) < USED[..., None]
    alone = found_in(QKV(queries, keys, values), USED)
    np.testing.assert_allclose(alone, expected(*map(np.asarray, numbers[:3]), cached), atol=1e-12)
    for used in (USED, 0 * USED):
        cached = np.arange(CAPACITY) < used[..., None]
        found = found_in(QKV(queries, keys, values), used, nodes=(node_keys, node_values, ancestors))
        joined = [np.concatenate(pair, axis=1) for pair in ((keys, node_keys), (values, node_values))]
        mask = np.concatenate([cached, ancestors], axis=2)
        np.testing.assert_allclose(found, expected(np.asarray(queries), *joined, mask), atol=1e-12)


@pytest.fixture
def read(numbers, monkeypatch):
    """A function that reads pieces of texts and then scores a tree; the least room for which it does so in blocks."""
    queries, keys, values, node_keys, node_values = (each.astype(jnp.float32) for each in numbers)
    mixer = FullAttention(2, 8, 6, weights="softmax", conventions=Conventions(softmax_scale="root"))
    rows = QKV(jnp.repeat(queries, 3, axis=1)[:, :7], keys[:, :7], values[:, :7])
    calls = []

    def counted(*arguments, **options):
        calls.append(arguments)
        return softmax_of_cache(*arguments, **options)

    monkeypatch.setattr("lin_jax.attention.full.softmax_of_cache", counted)

    def run(rows, queries, node_keys, node_values):
        state = mixer.init_state(2, CAPACITY, jnp.float32)
        lengths = jnp.asarray([7, 4])
        piece, state = mixer.parallel(rows, padded_rows(lengths, 7, state.position), state)
        nodes, _ = mixer.verify(QKV(queries, node_keys, node_values), tree_arrays((-1, 0, 0)), state)
        return piece[0], piece[1, :4], nodes

    def outputs(least):
        monkeypatch.setattr(softmax_cache, "LEAST", least)
        calls.clear()
        # Another function each time: what was compiled for it knows nothing of the new number.
        found = jax.jit(lambda *inputs: run(*inputs))(rows, queries, node_keys, node_values)
        return *found, len(calls)

    return outputs


def test_long_caches_are_read_in_blocks(read):
    *short, none = read(CAPACITY + 1)
    *long, twice = read(CAPACITY)
    assert (none, twice) == (0, 2)
    for one, other in zip(short, long, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_short_caches_and_accelerators_are_not(numbers, monkeypatch):
    part = QKV(*(each.astype(jnp.float32) for each in numbers[:3]))
    assert not softmax_cache.suits_blocks(part)
    monkeypatch.setattr(softmax_cache, "LEAST", CAPACITY)
    assert softmax_cache.suits_blocks(part)
    assert not softmax_cache.suits_blocks(part._replace(values=part.values.astype(jnp.bfloat16)))
    with compiling_for("gpu"):
        assert not softmax_cache.suits_blocks(part)
