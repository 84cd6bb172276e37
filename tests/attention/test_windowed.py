"""Windows with a memory: sizes of states, long decays, narrowed windows, and large scores."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax.attention import QKV, AttentionConfig, build_mixer, tree_arrays, whole_rows

HEADS, KV_HEADS, SIZE = 4, 2, 4


def mixer_of(**options: Any) -> Any:
    config = AttentionConfig(**({"name": "exponential+window", "features": 6} | options))
    sizes = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": SIZE}
    return build_mixer(config, **sizes, rngs=nnx.Rngs(0))


@jax.jit
def whole(mixer: Any, inputs: QKV) -> jax.Array:
    return mixer.parallel(inputs, whole_rows(*inputs.keys.shape[:2]))[0]


def inputs_of(length: int, factor: float = 1.0, batch: int = 1) -> QKV:
    rng = np.random.default_rng(length)
    shapes = [(batch, length, heads, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return QKV(*((factor * rng.normal(size=shape)).astype(np.float32) for shape in shapes))


@pytest.mark.parametrize(
    ("options", "slots"),
    [({"window": 5}, 4), ({"window": 1}, 0), ({"group_size": 3, "window_groups": 2}, 9)],
    ids=["sliding", "own token", "groups"],
)
def test_a_state_of_constant_size(options: dict[str, Any], slots: int) -> None:
    state = mixer_of(**options).init_state(1, 10_000, jnp.float32)
    assert state.keys.shape == (1, slots, KV_HEADS, SIZE)
    assert state.memory.shape == (1, KV_HEADS, 6, SIZE + 1)
    assert state.sink_keys is None
    kept = mixer_of(sinks=3, **options).init_state(1, 10_000, jnp.float32)
    assert kept.sink_keys.shape == kept.sink_values.shape == (1, 3, KV_HEADS, SIZE)


@pytest.mark.parametrize("decay", ["none", "token"])
def test_a_window_over_all_tokens_is_softmax(decay: str) -> None:
    inputs = inputs_of(20)
    softmax = build_mixer("softmax", heads=HEADS, kv_heads=KV_HEADS, head_dim=SIZE, rngs=nnx.Rngs(0))
    expected = whole(softmax, inputs)
    for options in ({"window": 20}, {"group_size": 10, "window_groups": 1}):
        found = whole(mixer_of(decay=decay, **options), inputs)
        np.testing.assert_allclose(found, expected, atol=2e-6)


def test_a_narrowed_window_shares_parameters() -> None:
    inputs, mixer = inputs_of(20), mixer_of(window=6)
    narrow = mixer.narrowed(2)
    expected = whole(mixer_of(window=2), inputs)
    np.testing.assert_allclose(whole(narrow, inputs), expected, atol=1e-6)
    assert mixer.window.tokens == 6


def test_learnt_features_start_near_softmax() -> None:
    """Random features estimate the exponential: more of them, closer."""
    inputs = inputs_of(64, 0.7)
    softmax = build_mixer("softmax", heads=HEADS, kv_heads=KV_HEADS, head_dim=SIZE, rngs=nnx.Rngs(0))
    expected = whole(softmax, inputs)

    def missed(features: int) -> float:
        found = whole(mixer_of(window=1, features=features), inputs)
        return float(np.sqrt(np.mean(np.square(found - expected))))

    assert missed(4096) < 0.4 * missed(8)


def test_without_its_sinks() -> None:
    """They enter the memory."""
    inputs, mixer = inputs_of(20), mixer_of(window=4, sinks=3)
    assert "sinks" in mixer.ablations()
    found, expected = whole(mixer.without("sinks"), inputs), whole(mixer_of(window=4), inputs)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert float(np.abs(found - whole(mixer, inputs)).max()) > 1e-3


@pytest.mark.parametrize(("branch", "options"), [("window", {"window": 1}), ("memory", {}), ("convolution", {})])
def test_without_a_branch(branch: str, options: dict[str, Any]) -> None:
    inputs, layout = inputs_of(20), whole_rows(1, 20)
    mixer = mixer_of(name="exponential+window+convolution", window=4, kernel_size=5)
    mixer.convolution.taps[...] = jnp.ones_like(mixer.convolution.taps[...])
    assert branch in mixer.ablations()
    found = whole(mixer.without(branch), inputs)
    if branch == "memory":
        scores = jnp.einsum("btkrd,bskd->bkrts", inputs.queries.reshape(1, 20, KV_HEADS, -1, SIZE), inputs.keys) / 2
        near = jnp.tri(20, dtype=bool) & ~jnp.tri(20, k=-4, dtype=bool)
        weights = jax.nn.softmax(jnp.where(near, scores, -jnp.inf))
        expected = jnp.einsum("bkrts,bske->btkre", weights, inputs.values).reshape(1, 20, HEADS, SIZE)
        expected = expected + mixer.convolution.parallel(inputs.values, layout).reshape(expected.shape)
    else:
        name = "exponential+window" + ("" if branch == "convolution" else "+convolution")
        other = mixer_of(**({"name": name, "window": 4, "kernel_size": 5} | options))
        if other.convolution is not None:
            other.convolution.taps[...] = mixer.convolution.taps[...]
        expected = whole(other, inputs)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["exponential+window", "hedgehog+window", "relu+window"])
def test_large_scores_leave_finite_outputs_and_gradients(name: str) -> None:
    """Keys whose exponents reach the cap, and queries of any scale."""
    mixer = mixer_of(name=name, window=3, decay="token")

    @jax.jit
    @jax.value_and_grad
    def total(inputs: QKV) -> jax.Array:
        return jnp.sum(jnp.square(mixer.parallel(inputs, whole_rows(1, 40))[0]))

    for factor in (0.0, 1.0, 30.0, 1e3):
        value, gradient = total(inputs_of(40, factor))
        assert np.isfinite(value), factor
        assert all(np.all(np.isfinite(part)) for part in gradient), factor


@pytest.mark.parametrize("decay", ["constant", "token"])
def test_decay_over_a_long_text(decay: str) -> None:
    """Token by token from a state and in one piece, over many half-lives, in float32."""
    length, mixer = 600, mixer_of(name="hedgehog+window", window=4, decay=decay)
    if decay == "token":
        mixer.decay.bias[...] = jnp.array([-20.0, 8.0])
    inputs = inputs_of(length)

    @jax.jit
    def one_by_one(inputs: QKV) -> jax.Array:
        def step(state: Any, token: QKV) -> tuple[Any, jax.Array]:
            outputs, nodes = mixer.verify(QKV(*(part[:, None] for part in token)), tree_arrays((-1,)), state)
            return mixer.commit(state, nodes, jnp.ones((1,), int)), outputs[:, 0]

        tokens = QKV(*(jnp.moveaxis(part, 1, 0) for part in inputs))
        return jnp.moveaxis(jax.lax.scan(step, mixer.init_state(1, 0, jnp.float32), tokens)[1], 0, 1)

    at_once = whole(mixer, inputs)
    np.testing.assert_allclose(one_by_one(inputs), at_once, atol=2e-5)


@pytest.mark.parametrize(
    ("fields", "label"),
    [
        ({"window": 8, "pattern": ["augmented", "softmax"]}, "[augmented, softmax of 8]"),
        ({"window": 8, "pattern": ["relu+window", "softmax"]}, "[relu+window of 8, softmax]"),
        (
            {"name": "relu+window", "window": 8, "decay": "token", "layers": {1: "softmax"}},
            "relu+window of 8, with softmax in layer 1",
        ),
        (
            {"name": "relu+window", "window": 8, "layers": {1: {"name": "softmax", "window": 4}}},
            "relu+window of 8, with softmax of 4 in layer 1",
        ),
        (
            {"name": "relu+window", "window": 8, "sinks": 2, "layers": {1: "softmax"}},
            "relu+window of 8 with 2 sinks, with softmax in layer 1",
        ),
        (
            {"window": 8, "sinks": 2, "pattern": ["augmented", "softmax"]},
            "[augmented, softmax of 8 with 2 sinks]",
        ),
    ],
)
def test_entries_of_a_mix_take_a_window_that_is_theirs(fields: dict[str, Any], label: str) -> None:
    config = AttentionConfig(**fields)
    assert config.label == label
    assert all(each.decay == "none" for each in config.kinds if each.name == "softmax")
