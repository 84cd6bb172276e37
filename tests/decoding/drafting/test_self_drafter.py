"""Drafts by some of the target's layers, where these are of several kinds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax.attention import AttentionConfig
from lin_jax.decoding import Generator, chain
from lin_jax.decoding.drafting.api import DraftContext
from lin_jax.decoding.drafting.drafters.model import SelfDrafter
from lin_jax.models import Llama, LlamaConfig

KINDS = ("augmented", "softmax", {"name": "hedgehog+window", "window": 3}, "augmented")
CONFIG = LlamaConfig(
    vocab_size=13,
    hidden_size=16,
    intermediate_size=16,
    num_layers=4,
    num_heads=2,
    initializer_range=0.4,
    attention=AttentionConfig(group_size=4, kernel_size=3, pattern=KINDS),
)
TOKENS = np.random.default_rng(0).integers(0, 13, (2, 9)).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    return Llama(CONFIG, rngs=nnx.Rngs(0))


def test_layers_get_their_own_part_of_the_state(model):
    """The first layers read what they read in the target, so that their states are those of a model of them alone."""
    lengths = jnp.asarray([9, 5])
    _, state = jax.jit(lambda model: model.prefill(TOKENS, lengths, model.init_state(2, 16)))(model)
    drafter = SelfDrafter(model, (0, 1, 2))
    shared, _ = drafter.begin(DraftContext(jnp.zeros(2, int), jnp.zeros((2, 16)), jnp.zeros((2, 0), int), state), None)
    _, alone = jax.jit(lambda model: model.prefill(TOKENS, lengths, model.init_state(2, 16)))(drafter.model)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-6), shared, alone)
    apart = state.selected((3, 1))
    np.testing.assert_array_equal(apart.of_layer(0).memory, state.of_layer(3).memory)
    np.testing.assert_array_equal(apart.of_layer(1).keys, state.of_layer(1).keys)


def test_texts_are_those_of_plain_decoding(model):
    prompts = [row.tolist() for row in TOKENS]
    plain = Generator(model).generate(prompts, 12).tokens
    assert Generator(model, drafter=SelfDrafter(model, (0, 2)), tree=chain(2)).generate(prompts, 12).tokens == plain
