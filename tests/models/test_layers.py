import jax
import jax.numpy as jnp
import numpy as np

from lin_jax.models.layers import RMSNorm, product_of_tokens, silu_product
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


def gradients(run, *inputs):
    """Outputs, and the gradient of a sum of them with weights of their own."""
    outputs, back = jax.vjp(run, *inputs)
    return outputs, *back(jnp.asarray(np.random.default_rng(1).standard_normal(outputs.shape), outputs.dtype))


def test_gradients_by_hand_are_those_that_jax_derives():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, other = (jnp.asarray(3 * rng.standard_normal((2, 5, 6))) for _ in range(2))
        scale = jnp.asarray(rng.standard_normal(6))

        def ours(x, scale):
            norm = RMSNorm(6, 1e-2, jnp.float64)
            norm.scale[...] = scale
            return norm(x)

        def plain(x, scale):
            return x * (jnp.mean(x**2, axis=-1, keepdims=True) + 1e-2) ** -0.5 * scale

        pairs = (
            (gradients(ours, x, scale), gradients(plain, x, scale)),
            (gradients(silu_product, x, other), gradients(lambda x, y: x / (1 + jnp.exp(-x)) * y, x, other)),
        )
        for found, wanted in pairs:
            for one, another in zip(found, wanted, strict=True):
                assert one.dtype == jnp.float64
                np.testing.assert_allclose(one, another, rtol=1e-12, atol=1e-12)


def test_gradients_are_jax_s_on_accelerators():
    x = jax.ShapeDtypeStruct((2, 3, 4), jnp.float32)

    def text():
        norm = RMSNorm(4, 1e-5, jnp.float32)
        return str(jax.make_jaxpr(lambda x, y: silu_product(norm(x), y))(x, x))

    assert text().count("custom_vjp_call") == 2
    with compiling_for("tpu"):
        assert "custom_vjp_call" not in text()
