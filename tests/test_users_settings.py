"""What is marked `users_settings` compiles as users do, here and in processes that it starts; all else does not."""

import os

import jax
import jax.numpy as jnp
import pytest
from support.compilation import NO_OPTIMIZATIONS, compiling_as_users


def fusions() -> int:
    """How many operations XLA joins, of which its fusion emitters take more."""
    x = jax.ShapeDtypeStruct((32, 32), jnp.float32)
    text = jax.jit(lambda x: jnp.sin(x @ x) + x.sum(0) * jnp.exp(x)).lower(x).compile().as_text()
    return text.count("fusion(")


@pytest.mark.skipif(NO_OPTIMIZATIONS not in os.environ, reason="all tests compile as users do")
def test_users_settings_are_others() -> None:
    quick, given = fusions(), dict(os.environ)
    with compiling_as_users():
        assert fusions() > quick
        assert not jax.config.read("jax_disable_most_optimizations")
        assert NO_OPTIMIZATIONS not in os.environ
        assert "emitters" not in os.environ["XLA_FLAGS"]
    assert jax.config.read("jax_disable_most_optimizations")
    assert dict(os.environ) == given
