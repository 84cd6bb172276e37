import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lin_jax.attention import full
from lin_jax.attention.full import causal_softmax
from pallas_kernels.implementations import compiling_for


def rows(length=10, size=16, dtype="float32"):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((2, length, heads, size)), dtype) for heads in (6, 3, 3)]


@pytest.fixture
def asked(monkeypatch):
    """What JAX's own attention was asked for; cuDNN's call is made by XLA, which takes the same arguments."""
    seen, real = [], jax.nn.dot_product_attention

    def call(*arguments, implementation=None, **options):
        seen.append(implementation)
        return real(*arguments, implementation="xla", **options)

    monkeypatch.setattr(full.jax.nn, "dot_product_attention", call)
    return seen


def test_cudnn_is_asked_for_the_same(asked):
    expected = causal_softmax(*rows(dtype="bfloat16"), 0.3)
    with compiling_for("gpu"):
        found = causal_softmax(*rows(dtype="bfloat16"), 0.3)
    assert asked == [None, "cudnn"]
    np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), rtol=1e-2, atol=1e-2)


ODD = [{}, {"dtype": "bfloat16", "size": 12}, {"dtype": "bfloat16", "size": 256}, {"dtype": "bfloat16", "length": 9}]


@pytest.mark.parametrize("case", ODD)
def test_plain_xla_takes_what_cudnn_does_not(asked, case):
    with compiling_for("gpu"):
        causal_softmax(*rows(**case), 0.3)
    assert asked == [None]


def test_plain_xla_if_it_is_asked_for(asked):
    with compiling_for("gpu"):
        causal_softmax(*rows(dtype="bfloat16"), 0.3, "xla")
    assert asked == [None]
