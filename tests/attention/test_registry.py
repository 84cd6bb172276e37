"""Attentions of one's own: registered by name, in every form, beside the package's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax.attention import (
    QKV,
    REGISTRY,
    AttentionConfig,
    AttentionEntry,
    build_mixer,
    kernel_attention,
    register,
    whole_rows,
)
from lin_jax.attention.config import Conventions
from lin_jax.attention.feature_maps import FeatureMap
from lin_jax.errors import UserError


class Softplus(FeatureMap):
    def __init__(self, size):
        self.size = size

    def queries(self, queries):
        return jax.nn.softplus(queries)

    def keys(self, keys):
        return jax.nn.softplus(keys)


ENTRY = AttentionEntry(
    kernel_attention(lambda config, sizes: Softplus(sizes.head_dim)), ("causal",), positive=True, additive=True
)


@pytest.fixture
def registered():
    register("softplus", ENTRY)
    yield
    del REGISTRY["softplus"]


@pytest.mark.usefixtures("registered", "x64")
def test_a_feature_map_of_ones_own_is_an_attention():
    register("softplus", ENTRY)  # A cell that is run again.
    mixer = build_mixer("softplus", heads=2, kv_heads=2, head_dim=4, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    q, k, v = (np.random.default_rng(seed).normal(size=(1, 70, 2, 4)) for seed in range(3))
    found, _ = mixer.parallel(QKV(q, k, v), whole_rows(1, 70))
    weights = np.einsum("bthd,bshd->bhts", np.log1p(np.exp(q)), np.log1p(np.exp(k))) * np.tri(70)
    expected = np.einsum("bhts,bshe->bthe", weights / weights.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    with pytest.raises(UserError, match="has no bidirectional form"):
        build_mixer("softplus", form="bidirectional", heads=2, kv_heads=2, head_dim=4, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("relu", "attention name 'relu' is taken; give another"),
        ("augmented", "is taken"),
        ("a+b", r"attention name 'a\+b' is no word"),
    ],
)
def test_names_that_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        register(name, ENTRY)
    with pytest.raises(UserError, match="has no form"):
        register("mine", ENTRY._replace(forms=()))
    assert "mine" not in REGISTRY


BIASED = Conventions(relative=True)


def mixer_asked(name, implementation, form="causal", conventions=None, **fields):
    config = AttentionConfig(name, 4, 3, implementation=implementation, **fields)
    sizes = {"heads": 2, "kv_heads": 1, "head_dim": 4}
    options = {"form": form, "conventions": conventions, **sizes}
    return nnx.eval_shape(lambda: build_mixer(config, **options, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("augmented", {"decay": "token"}, r"attention.decay 'token' of 'augmented', which has no \+window"),
        ("exponential", {"decay": "constant"}, r"attention.decay 'constant' of 'exponential'"),
        ("clustered+window", {}, r"a window before the features of 'clustered\+window'"),
        ("exponential+window", {"form": "bidirectional"}, "a window in bidirectional attention"),
        ("exponential+window", {"conventions": BIASED}, "a window where the model adds a relative bias"),
    ],
)
def test_a_window_or_decay_without_kernels_refuses_them_by_name(name, options, message):
    wanted = f"attention.implementation is 'tpu', and no kernel computes {message}.*; leave it out, or give 'xla'"
    with pytest.raises(UserError, match=wanted):
        mixer_asked(name, "tpu", **options)
    for fine in (None, "xla"):
        mixer_asked(name, fine, **options)


@pytest.mark.parametrize("name", ["augmented", "softmax", "performer", "exponential+window", "hedgehog+window"])
def test_other_attentions_take_any_implementation(name):
    """Those that have kernels, and those that stand beside them in a mix and take no notice."""
    mixer_asked(name, "gpu")
