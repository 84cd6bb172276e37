"""Typical acceptance against its formula in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from lin_jax.decoding.acceptance.rules import is_typical


def test_formula(x64: None) -> None:
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(6, 0.4), (40, 3))
    p[:, 0, :2] = 0
    p /= p.sum(-1, keepdims=True)
    tokens = rng.integers(-1, 6, (40, 3))
    with np.errstate(divide="ignore"):
        log_p = np.log(p)
    entropy = -np.sum(p * np.where(p > 0, log_p, 0), axis=-1)
    for epsilon, alpha in ((0.09, 0.3), (0.3, 0.09), (1.0, 0.7)):
        chance = np.take_along_axis(p, np.maximum(tokens, 0)[..., None], axis=-1)[..., 0]
        expected = (chance > np.minimum(epsilon, alpha * np.exp(-entropy))) & (tokens >= 0)
        found = jax.jit(is_typical)(jnp.asarray(log_p), jnp.asarray(tokens), epsilon, alpha)
        np.testing.assert_array_equal(found, expected)
        assert expected.any()
        assert not expected.all()


def test_certain_and_uncertain_targets() -> None:
    certain = jnp.log(jnp.asarray([0.97, 0.02, 0.01]))
    uncertain = jnp.full(1000, -jnp.log(1000.0))
    # A token of one in fifty is typical of nothing so certain; one in a thousand is, of a uniform distribution.
    assert is_typical(certain[None, None], jnp.asarray([[0]])).tolist() == [[True]]
    assert is_typical(certain[None, None], jnp.asarray([[1]])).tolist() == [[False]]
    assert is_typical(uncertain[None, None], jnp.asarray([[5]])).tolist() == [[True]]
