"""A model says the same whichever implementation computes its attention: training, reading, speculation."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.backends import KERNELS
from support.cells import cells, some_of

from lin_jax.attention import AttentionConfig, TreeArrays, tree_arrays
from lin_jax.attention.feature_maps import EluPlusOne, Hedgehog
from lin_jax.attention.layout import masked_rows, whole_rows
from lin_jax.attention.windowed_kernels import verify_program, windowed_program
from lin_jax.decoding import Generator, NgramDrafter, chain
from lin_jax.models import Llama, LlamaConfig
from pallas_kernels.types import QKV, WindowedState
from pallas_kernels.windows.window import AttentionWindow

VOCABULARY = 17
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    attention=AttentionConfig("augmented", 16, 15, initial_alpha=0.3),
)


def build(implementation: str, name: str = "augmented", **fields: Any) -> Llama:
    attention = replace(CONFIG.attention, name=name, implementation=implementation, **fields)
    model = Llama(replace(CONFIG, attention=attention), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for _, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        parameter[...] = parameter[...] + jnp.asarray(rng.normal(size=parameter.shape) / 20, parameter.dtype)
    return model


def loss(model: Llama, tokens: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    return jnp.mean(jnp.square(model(tokens, segment_ids)))


@pytest.mark.parametrize("implementation", some_of(KERNELS, 1))
class TestImplementation:
    @pytest.mark.parametrize(
        ("name", "documents"),
        cells([("augmented", True)], [("augmented", False), ("flash_local+convolution", True), ("flash_global", True)]),
    )
    def test_training(self, implementation: str, name: str, documents: bool) -> None:
        """Logits and gradients, of documents side by side or of whole rows."""
        rng = np.random.default_rng(1)
        tokens = jnp.asarray(rng.integers(0, VOCABULARY, (2, 40)))
        segment_ids = jnp.asarray(np.repeat([[1, 2, 0], [1, 1, 2]], [19, 14, 7], axis=1)) if documents else None
        found = jax.jit(nnx.value_and_grad(loss))(build(implementation, name), tokens, segment_ids)
        expected = jax.jit(nnx.value_and_grad(loss))(build("xla", name), tokens, segment_ids)
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
        for one, other in zip(*(jax.tree.leaves(nnx.to_pure_dict(each[1])) for each in (found, expected)), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5 * float(np.abs(other).max()) + 1e-9)

    @pytest.mark.thorough
    def test_speculation(self, implementation: str) -> None:
        """Prompts are read in pieces, drafts verified and committed, across groups."""
        prompts = [[1, 2, 3, 4] * 9, [5, 6] * 3, [7] * 17]
        found, expected = (
            Generator(
                build(each), drafter=NgramDrafter(depth=3, lookback=32), tree=chain(3), prefill_chunk_size=32
            ).generate(prompts, 12, slots=2)
            for each in (implementation, "xla")
        )
        assert found.tokens == expected.tokens
        assert found.mean_accepted_tokens > 1


def documents() -> tuple[jax.Array, jax.Array]:
    """Tokens and segment ids of two rows."""
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, VOCABULARY, (2, 70)))
    return tokens, jnp.asarray(np.repeat([[1, 2, 0], [1, 1, 2]], [49, 14, 7], axis=1))


def verified(model: Llama, tokens: jax.Array, tree: TreeArrays) -> jax.Array:
    """Hidden vectors of a tree's nodes after two texts of different lengths."""
    nodes = tree.depth.shape[0]
    _, state = model.prefill(tokens[:, nodes:], jnp.asarray([44, 3]), model.init_state(2))
    return model.verify(tokens[:, :nodes], tree, state)[0]


@pytest.mark.parametrize("implementation", cells(KERNELS[:1], KERNELS[1:]))
@pytest.mark.parametrize(
    ("name", "fields"),
    cells(
        [("exponential+window+convolution", {"decay": "token", "features": 16})],
        [
            ("hedgehog+window", {"window": 20, "sinks": 3}),
            ("hedgehog+window", {"window": 20}),
            ("exponential+window", {"decay": "constant", "window_groups": 2}),
        ],
    ),
)
class TestWindowAndMemory:
    @pytest.mark.thorough
    def test_outputs(self, implementation: str, name: str, fields: dict[str, Any]) -> None:
        """Logits of documents side by side."""
        tokens, segment_ids = documents()
        found, expected = (
            jax.jit(lambda model: model(tokens, segment_ids))(build(each, name, **fields))
            for each in (implementation, "xla")
        )
        there = segment_ids > 0
        np.testing.assert_allclose(found[there], expected[there], atol=1e-5 * float(jnp.abs(expected).max()))

    def test_a_tree(self, implementation: str, name: str, fields: dict[str, Any]) -> None:
        """Nodes on top of what has been read, also those whose path leaves the window."""
        tree = tree_arrays((-1, *range(12), 0, 3, 13))
        tokens = documents()[0]
        found, expected = (
            jax.jit(verified)(build(each, name, **fields), tokens, tree) for each in (implementation, "xla")
        )
        np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))

    @pytest.mark.thorough
    def test_training(self, implementation: str, name: str, fields: dict[str, Any]) -> None:
        """Logits and gradients of documents side by side."""
        tokens, segment_ids = documents()
        found, expected = (
            jax.jit(nnx.value_and_grad(loss))(build(each, name, **fields), tokens, segment_ids)
            for each in (implementation, "xla")
        )
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
        for one, other in zip(*(jax.tree.leaves(nnx.to_pure_dict(each[1])) for each in (found, expected)), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(other).max()) + 1e-8)

    @pytest.mark.thorough
    def test_speculation(self, implementation: str, name: str, fields: dict[str, Any]) -> None:
        """Prompts are read in pieces, and what is written goes on from the state that kernels leave."""
        prompts = [[1, 2, 3, 4] * 9, [5, 6] * 3, [7] * 17]
        found, expected = (
            Generator(
                build(each, name, **fields),
                drafter=NgramDrafter(depth=3, lookback=32),
                tree=chain(3),
                prefill_chunk_size=32,
            ).generate(prompts, 12, slots=2)
            for each in (implementation, "xla")
        )
        assert found.tokens == expected.tokens


def test_what_no_kernel_computes_is_left_to_xla() -> None:
    """The configuration's implementation is for those attentions that have kernels."""
    rows, window = QKV(*jnp.zeros((3, 1, 8, 1, 16))), AttentionWindow(None, 16)
    learnt, layout = Hedgehog(16, 1, 1), whole_rows(1, 8)
    assert windowed_program(learnt, window, rows, layout, KERNELS[0]) == KERNELS[0]
    assert windowed_program(learnt, window, rows, layout, "xla") == "xla"
    assert windowed_program(learnt, AttentionWindow(0), rows, layout, KERNELS[0]) is None
    assert windowed_program(learnt, window, rows, masked_rows(jnp.ones((1, 8))), KERNELS[0]) is None
    assert windowed_program(EluPlusOne(16), window, rows, layout, KERNELS[0]) is None
    ring = jnp.zeros((1, window.capacity, 1, 16))
    state = WindowedState(jnp.zeros((1, 1, 32, 17)), ring, ring, None, None, jnp.zeros((1,), jnp.int32))
    assert verify_program(learnt, window, rows, state, KERNELS[0]) == KERNELS[0]
    assert verify_program(learnt, window, rows, state, "xla") is None
    assert verify_program(EluPlusOne(16), window, rows, state, KERNELS[0]) is None
    no_window = replace(state, keys=ring[:, :0], values=ring[:, :0])
    assert verify_program(learnt, AttentionWindow(1), rows, no_window, KERNELS[0]) is None
    half = QKV(*(each.astype(jnp.float16) for each in rows))
    assert windowed_program(learnt, window, half, layout, KERNELS[0]) == "xla"
