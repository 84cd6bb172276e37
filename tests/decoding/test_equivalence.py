"""First differences, and ties within rounding."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.cells import cells
from support.samples import VOCABULARY, build_model

from lin_jax.attention import AttentionConfig, build_mixer
from lin_jax.decoding import Generator, Sampling, chain
from lin_jax.decoding.drafting.drafters.model import SelfDrafter
from lin_jax.decoding.equivalence import first_difference, is_rounding_tie, state_difference
from lin_jax.models import Llama, LlamaConfig


def test_differences_and_rounding_ties() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 4, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2)
    model = Llama(config, rngs=nnx.Rngs(0))
    best = int(jnp.argmax(model(jnp.asarray([[3, 4, 5]]))[0, -1]))
    other = (best + 1) % 11
    assert not is_rounding_tie(model, [3, 4], [5, best], [5, other], Sampling(), 0)
    assert not is_rounding_tie(model, [3, 4], [5], [5, other], Sampling(), 0)
    kernel = model.head.kernel[...]
    model.head.kernel[...] = kernel.at[:, other].set(kernel[:, best] * (1 + 1e-7))
    assert is_rounding_tie(model, [3, 4], [5, best], [5, other], Sampling(), 0)
    assert not is_rounding_tie(model, [3, 4], [5, best], [5, other], Sampling(1.0), 0)


@pytest.mark.parametrize("count", cells([16], [50]))
@pytest.mark.thorough
def test_bfloat16_parts_at_ties_alone(count: int) -> None:
    """Several nodes are rounded otherwise than a single token: texts part where logits are equal, and nowhere else."""
    model = build_model("augmented", dtype="bfloat16")
    prompts = np.random.default_rng(0).integers(0, VOCABULARY, (count, 12)).tolist()
    plain = Generator(model).generate(prompts, 100, slots=16)
    drafted = Generator(model, drafter=SelfDrafter(model, (0,)), tree=chain(3)).generate(prompts, 100, slots=16)
    for row, (one, other) in enumerate(zip(plain.tokens, drafted.tokens, strict=True)):
        assert one == other or is_rounding_tie(model, prompts[row], one, other, Sampling(), 0, row)


@pytest.mark.parametrize("name", ["augmented", "hedgehog+window"])
def test_differences_of_states(name: str) -> None:
    """Relative to the largest number of an array; empty slots of a group do not count, and unequal positions do."""
    config = AttentionConfig(name, group_size=4, kernel_size=3)
    mixer = build_mixer(config, heads=2, kv_heads=2, head_dim=2, rngs=nnx.Rngs(0))
    empty = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), mixer.init_state(1, 1, jnp.float32))
    state = replace(empty, position=np.array([2]))
    assert state_difference(state, state) == 0
    assert state_difference(replace(state, position=np.array([3])), state) == float("inf")
    assert state_difference(replace(state, memory=1.5 * state.memory), state) == 0.5
    for slot, counts in ((1, True), (3, name != "augmented")):
        keys = state.keys.copy()
        keys[:, slot] = 3
        assert state_difference(replace(state, keys=keys), state) == 2 * counts
