"""Division by a normaliser: values and gradients where all weights are tiny, or none is there."""

import jax
import jax.numpy as jnp
import numpy as np

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
