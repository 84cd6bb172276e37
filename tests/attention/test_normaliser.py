"""Division by a normaliser: values and gradients where all weights are tiny, or none is there."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.linear_attention import linear_attention
from pallas_kernels.windows.normaliser import divided


def test_tiny_normalisers():
    """A power of two in all weights changes no bit of a quotient, nor its gradient but by that factor."""
    rng = np.random.default_rng(0)
    sums = jnp.asarray(np.abs(rng.standard_normal((3, 1, 1, 5))), jnp.float32)

    @jax.jit
    def both(factor):
        return jax.value_and_grad(lambda sums: jnp.sum(divided(sums) ** 2))(sums * factor)

    value, gradient = both(1.0)
    for factor in (2.0**-100, 2.0**60):
        found, scaled = both(factor)
        assert found == value
        np.testing.assert_allclose(scaled * factor, gradient, rtol=1e-5, atol=1e-6)
    empty, nothing = both(0.0)
    assert empty == 0
    assert np.isfinite(nothing).all()


def test_linear_attention_with_tiny_features():
    """Features of 1e-12 in float32: sums of weights of 1e-24, whose square is zero."""
    rng = np.random.default_rng(1)
    rows = [jnp.asarray(np.abs(rng.standard_normal((1, 5, 1, 4))), jnp.float32) for _ in range(3)]

    @jax.jit
    def gradient(factor, values):
        def total(queries, keys):
            return jnp.sum(linear_attention(queries, keys, values, floor=0.0, implementation="xla")[0] ** 2)

        return jax.grad(total, (0, 1))(factor * rows[0], factor * rows[1])

    factor = 2.0**-40
    for tiny, plain in zip(gradient(factor, rows[2]), gradient(1.0, rows[2]), strict=True):
        np.testing.assert_allclose(tiny * factor, plain, rtol=1e-4, atol=1e-5)
