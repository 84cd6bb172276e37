"""The memory's start from a teacher against loops over rows, heads, queries and keys in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.cells import cells
from support.oracle import positive_features

from lin_jax.attention import QKV, AttentionConfig, build_mixer, packed_rows, whole_rows
from lin_jax.attention.memory_start import PARTS, TEMPERATURES, can_fit, fit_memory, k_means

HEADS, KV_HEADS, SIZE, LENGTH = 4, 2, 4, 24
DOCUMENTS = np.array([[1] * 15 + [2] * 7 + [0] * 2, [1] * LENGTH])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def mixer_of(**options):
    config = AttentionConfig(**({"name": "clustered+window", "features": 5, "window": 4} | options))
    return build_mixer(config, heads=HEADS, kv_heads=KV_HEADS, head_dim=SIZE, param_dtype=jnp.float64, rngs=nnx.Rngs(0))


def vectors(size=1.5, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((2, LENGTH, heads, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return QKV(*(jnp.asarray(rng.normal(0, size, shape)) for shape in shapes))


def slow_rows(mixer, base, qkv, layout, head):
    """Of each query of a head with something before its window: window's and teacher's sums, and the memory's."""
    queries, keys, values = (np.asarray(each) for each in qkv)
    own, share = head // 2, head % 2
    asked = positive_features(base, mixer.linear.features, own, share)
    held = positive_features(base, mixer.linear.features, own, None)
    decays = None if mixer.decay is None else np.asarray(mixer.decay.logarithms(qkv.values))
    window, found = mixer.window, []
    for row, t in np.ndindex(2, LENGTH):
        near, beyond, memory = (np.zeros(1 + SIZE) for _ in range(3))
        for s in range(t + 1):
            if DOCUMENTS[row, s] != DOCUMENTS[row, t] or not DOCUMENTS[row, t]:
                continue
            one = np.append(1, values[row, s, own])
            weight = np.exp(queries[row, t, head] @ keys[row, s, own] / SIZE**0.5) * one
            place = int(layout.positions[row, s])
            if t - s < window.tokens or place < window.sinks:
                near += weight
                continue
            beyond += weight
            kept = 1 if decays is None else np.exp(decays[row, s + 1 : t + 1, own].sum())
            memory += kept * (asked(queries[row, t, head]) @ held(keys[row, s, own])) * one
        if beyond[0]:
            found.append((near, beyond, memory))
    return found


def share_of(rows, balance):
    return np.mean([np.exp(balance) * far[0] / (near[0] + np.exp(balance) * far[0]) for near, _, far in rows])


def error_of(rows, balance):
    total = 0.0
    for near, beyond, memory in rows:
        found, wanted = near + np.exp(balance) * memory, near + beyond
        total += np.sum((found[1:] / found[0] - wanted[1:] / wanted[0]) ** 2)
    return total


def balance_of(rows, target):
    low, high = -60.0, 60.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if share_of(rows, middle) < target else (low, middle)
    return low


@pytest.mark.parametrize(
    "options",
    cells([{}, {"name": "hedgehog+window", "decay": "constant", "sinks": 2}], [{"name": "exponential+window"}]),
    ids=str,
)
def test_shares_and_choice_are_those_of_loops(options):
    mixer, qkv, layout = mixer_of(**options), vectors(), packed_rows(jnp.asarray(DOCUMENTS))
    base = options.get("name", "clustered+window").split("+")[0]
    fitted, shares = jax.jit(fit_memory)(mixer, qkv, layout, jax.random.key(0))
    centres = fitted.linear.features.key_map[...]
    for head in range(HEADS):
        place = head // 2, head % 2
        before, after = (slow_rows(each, base, qkv, layout, head) for each in (mixer, fitted))
        teacher = np.mean([beyond[0] / (near[0] + beyond[0]) for near, beyond, _ in after])
        balance = float(fitted.balance[place])
        np.testing.assert_allclose(shares.teacher[place], teacher, rtol=1e-10)
        np.testing.assert_allclose(shares.before[place], share_of(before, 0), rtol=1e-10)
        np.testing.assert_allclose(shares.after[place], share_of(after, balance), rtol=1e-10)
        tried = []
        for temperature in TEMPERATURES if base == "clustered" else (None,):
            other = mixer
            if temperature is not None:
                other = nnx.clone(mixer)
                other.linear.features = mixer.linear.features.centred_at(centres, jnp.full((2, 2), temperature))
            rows = slow_rows(other, base, qkv, layout, head)
            tried += [error_of(rows, balance_of(rows, part * teacher)) for part in PARTS]
        np.testing.assert_allclose(error_of(after, balance), min(tried), rtol=1e-8)


@pytest.mark.parametrize("name", cells(["exponential"], ["hedgehog"]))
def test_a_memory_beside_large_keys_starts_alive(name):
    """The teacher's scores are beyond what features come to; unfitted, nothing is left of the gradient."""
    mixer, layout = mixer_of(name=f"{name}+window"), whole_rows(2, LENGTH)
    queries, keys, values = vectors(size=1.0)
    # All are close to one direction, so that scores are large, and alike.
    qkv = QKV(queries / 4 + 6, keys / 4 + 6, values)
    fitted, shares = jax.jit(fit_memory)(mixer, qkv, layout, jax.random.key(0))
    assert np.all(np.asarray(shares.before) < 1e-6)
    assert np.all(np.asarray(shares.after) > 0.9 * PARTS[-1] * np.asarray(shares.teacher))
    wanted = build_mixer("softmax", heads=HEADS, kv_heads=KV_HEADS, head_dim=SIZE, rngs=nnx.Rngs(0))
    expected, _ = wanted.parallel(qkv, layout)
    graph = nnx.split(mixer)[0]

    @jax.jit
    def loss(state):
        return jnp.sum(jnp.square(nnx.merge(graph, state).parallel(qkv, layout)[0] - expected))

    losses, slopes = zip(*(jax.jit(jax.value_and_grad(loss))(nnx.state(each)) for each in (mixer, fitted)), strict=True)
    steepest = [float(jnp.max(jnp.abs(each["balance"][...]))) for each in slopes]
    assert steepest[0] < 1e-5
    assert steepest[1] > 1e-3
    assert losses[1] < losses[0]


def test_centres_of_separate_clusters_are_found():
    rng = np.random.default_rng(0)
    middles = np.array([[9.0, 0], [0, 9], [-9, -9]])
    points = middles[rng.integers(0, 3, 60)] + rng.normal(0, 0.1, (60, 2))
    weights = np.ones(80)
    weights[60:] = 0
    outside = np.concatenate([points, np.full((20, 2), 100.0)])
    centres = np.asarray(k_means(jnp.asarray(outside), jnp.asarray(weights), 8, jax.random.key(1)))
    assert np.abs(centres).max() < 10
    distances = np.linalg.norm(points[:, None] - centres, axis=-1).min(axis=1)
    assert distances.max() < 0.6


def test_rows_within_the_window_leave_the_balance_alone():
    mixer = mixer_of(window=64)
    fitted, shares = jax.jit(fit_memory)(mixer, vectors(), whole_rows(2, LENGTH), jax.random.key(0))
    assert not np.any(np.asarray(fitted.balance[...]))
    assert not np.any(np.asarray(shares.teacher))


def test_what_has_no_balance_cannot_be_fitted():
    assert can_fit(mixer_of())
    assert not can_fit(mixer_of(name="clustered", window=None, decay="token"))
    assert not can_fit(mixer_of(name="augmented", window=None))
