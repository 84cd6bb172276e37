"""Attentions of one's own: registered by name, in every form, beside the package's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax.attention import QKV, REGISTRY, AttentionEntry, build_mixer, kernel_attention, register, whole_rows
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
