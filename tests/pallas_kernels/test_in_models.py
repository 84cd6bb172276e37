"""A model says the same whichever implementation computes its attention: training, reading, speculation."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.backends import KERNELS
from support.cells import cells

from lin_jax.attention import AttentionConfig
from lin_jax.decoding import Generator, NgramDrafter, chain
from lin_jax.models import Llama, LlamaConfig

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


def build(implementation: str, name: str = "augmented") -> Llama:
    attention = replace(CONFIG.attention, name=name, implementation=implementation)
    model = Llama(replace(CONFIG, attention=attention), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for _, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        parameter[...] = parameter[...] + jnp.asarray(rng.normal(size=parameter.shape) / 20, parameter.dtype)
    return model


def loss(model: Llama, tokens: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    return jnp.mean(jnp.square(model(tokens, segment_ids)))


@pytest.mark.parametrize("implementation", KERNELS)
class TestImplementation:
    @pytest.mark.parametrize("name", cells(["augmented"], ["flash_local+convolution", "flash_global"]))
    def test_training(self, implementation: str, name: str) -> None:
        """Logits and gradients, of whole rows and of documents side by side."""
        rng = np.random.default_rng(1)
        tokens = jnp.asarray(rng.integers(0, VOCABULARY, (2, 40)))
        segment_ids = jnp.asarray(np.repeat([[1, 2, 0], [1, 1, 2]], [19, 14, 7], axis=1))
        for layout in (None, segment_ids) if name == "augmented" else (segment_ids,):
            found = jax.jit(nnx.value_and_grad(loss))(build(implementation, name), tokens, layout)
            expected = jax.jit(nnx.value_and_grad(loss))(build("xla", name), tokens, layout)
            np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
            for one, other in zip(
                *(jax.tree.leaves(nnx.to_pure_dict(each[1])) for each in (found, expected)), strict=True
            ):
                np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(other).max()) + 1e-9)

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
