import jax
import jax.numpy as jnp
import numpy as np

from lin_jax.models.layers import product_of_tokens
from lin_jax.models.rotary import RotaryConfig, computed_once, rotary_table
from pallas_kernels.implementations import compiling_for

LAST = (((2,), (0,)), ((), ()))


def test_a_product_of_tokens_and_its_gradient_are_those_of_dot_general():
    rng = np.random.default_rng(0)
    x, weight, given = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 3, 4), (4, 5), (2, 3, 5))
    )

    def run(product):
        outputs, back = jax.vjp(lambda x, weight: product(x, weight, LAST), x, weight)
        return outputs, *back(given)

    for found, wanted in zip(run(product_of_tokens), run(jax.lax.dot_general), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_tokens_stay_in_their_rows_on_accelerators():
    shapes = jax.ShapeDtypeStruct((2, 3, 4), jnp.float32), jax.ShapeDtypeStruct((4, 5), jnp.float32)

    def text():
        return str(jax.make_jaxpr(lambda x, weight: product_of_tokens(x, weight, LAST))(*shapes))

    assert "reshape" in text()
    with compiling_for("tpu"):
        assert "reshape" not in text()


def test_a_rotary_table_is_computed_once_for_many_tokens_on_a_cpu():
    x = jnp.ones((1, 128, 4))
    table = rotary_table(jnp.arange(128)[None], 8, RotaryConfig(), jnp.float32)
    for found, wanted in zip(jax.jit(computed_once)(table, x), table, strict=True):
        np.testing.assert_array_equal(found, wanted)

    def text(tokens):
        # JAX remembers how it has traced a function: a new one each time.
        return str(jax.make_jaxpr(lambda table, x: computed_once(table, x))(table, x[:, :tokens]))

    assert "cond" in text(128)
    assert "cond" not in text(64)
    with compiling_for("gpu"):
        assert "cond" not in text(128)
