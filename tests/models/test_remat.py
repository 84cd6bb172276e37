"""What is recomputed in the backward pass changes no gradient, and what is kept is not computed twice."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax.attention import AttentionConfig
from lin_jax.errors import UserError
from lin_jax.models import Llama, LlamaConfig

PLAIN = LlamaConfig(13, 32, 48, 2, 2, attention=AttentionConfig(group_size=4, kernel_size=3))
TOKENS = jnp.arange(12).reshape(1, 12)


def gradient(config):
    model = Llama(config, rngs=nnx.Rngs(0))
    program = jax.jit(jax.grad(lambda model: jnp.sum(jnp.square(model(TOKENS)))))
    return str(jax.make_jaxpr(program)(model)).count("dot_general"), jax.tree.leaves(program(model))


def test_gradients_are_the_same_and_products_are_kept():
    (plain, expected), (nothing, found), (products, kept) = (
        gradient(replace(PLAIN, remat=remat, remat_keeps=keeps))
        for remat, keeps in ((False, "nothing"), (True, "nothing"), (True, "products"))
    )
    assert plain <= products < nothing
    for one, two, three in zip(expected, found, kept, strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(three, one, rtol=1e-5, atol=1e-6)


def test_an_unknown_choice_is_refused():
    with pytest.raises(UserError, match=r"remat_keeps 'all' is unknown; choose one of nothing, products"):
        replace(PLAIN, remat_keeps="all")
