import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.cells import cells

from lin_jax.attention import AttentionConfig, TreeArrays
from lin_jax.hub import from_pretrained, save_pretrained
from lin_jax.models import Flash, FlashConfig, Llama, LlamaConfig, SeparateLayers

MODELS = {
    "llama": lambda: Llama(
        LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=32,
            num_layers=3,
            num_heads=2,
            attention=AttentionConfig("performer+local+convolution", group_size=4, kernel_size=5),
        ),
        rngs=nnx.Rngs(0),
    ),
    "flash": lambda: Flash(
        FlashConfig(
            vocab_size=50,
            hidden_size=16,
            num_layers=3,
            query_key_size=8,
            attention=AttentionConfig("flash", group_size=4),
        ),
        rngs=nnx.Rngs(0),
    ),
}


def everything(model):
    """Reads rows that end inside groups, verifies a tree behind them, and commits paths of which one ends a group."""
    tokens = jnp.arange(14).reshape(2, 7)
    state = model.init_state(2)
    _, state = model.prefill(tokens, jnp.array([7, 2]), state)
    tree = TreeArrays(
        jnp.array([0, 1, 1, 2]), jnp.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], bool)
    )
    hidden, nodes = model.verify(tokens[:, :4], tree, state)
    after = model.commit(state, nodes, jnp.array([[0, 2, 3], [0, 1, 1]]), jnp.array([3, 1]))
    return model.hidden(tokens), hidden, after


@pytest.mark.parametrize(("name", "some"), cells([("llama", [2, 0])], [("llama", [0, 1, 2]), ("flash", [2, 0])]))
def test_separate_layers_change_nothing(name, some, x64):
    model = MODELS[name]()
    expected = jax.jit(everything)(model.with_layers(some))
    model.layers = SeparateLayers.of(model.layers)
    found = jax.jit(everything)(model.with_layers(some))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), found, expected)


def test_a_stack_is_used_up_and_comes_back():
    stack = MODELS["llama"]().layers
    expected = nnx.state(stack)
    layers = SeparateLayers.of(stack)
    assert layers.count == 3
    assert stack.layers is None
    jax.tree.map(np.testing.assert_array_equal, nnx.state(layers.together()), expected)


def test_a_model_with_separate_layers_is_exported_as_it_was(tmp_path):
    model = MODELS["llama"]()
    tokens = jnp.arange(8)[None]
    expected = model(tokens)
    model.layers = SeparateLayers.of(model.layers)
    assert isinstance(model.layers, SeparateLayers)
    np.testing.assert_array_equal(from_pretrained(save_pretrained(model, tmp_path / "out"))(tokens), expected)
    assert isinstance(model.layers, SeparateLayers)
