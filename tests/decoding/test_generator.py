"""What a generator refuses: trees, options and prompts that do not fit."""

import pytest
from flax import nnx

from lin_jax.attention import AttentionConfig
from lin_jax.decoding import DynamicTree, Generator, NgramDrafter, PathDrafter, chain
from lin_jax.decoding.drafting.drafters import DraftParts
from lin_jax.errors import UserError
from lin_jax.models import Llama, LlamaConfig, PathHead


def test_tree_must_fit_group_and_drafter() -> None:
    config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2)
    model = Llama(LlamaConfig(**{**config.__dict__, "attention": AttentionConfig(group_size=4)}), rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="a group holds 4 tokens"):
        Generator(model, drafter=NgramDrafter(depth=4))
    with pytest.raises(UserError, match="the drafter offers"):
        Generator(model, drafter=NgramDrafter(depth=2), tree=chain(3))
    with pytest.raises(UserError, match="a prompt is empty; give at least one token"):
        Generator(model).generate([[]], 3)
    with pytest.raises(UserError, match="there are no prompts; give at least one"):
        Generator(model).generate([], 3)
    with pytest.raises(UserError, match="no distribution"):
        Generator(model, drafter=NgramDrafter(depth=2), acceptance="rejection")
    path = PathDrafter(PathHead.on(model, 4, nnx.Rngs(0)))
    with pytest.raises(UserError, match="fixed shape"):
        Generator(model, drafter=path, tree=DynamicTree(3, 2), acceptance="rejection")
    with pytest.raises(UserError, match="temperature above 0"):
        Generator(model, drafter=path, tree=chain(2), acceptance="rejection").generate([[1]], 3)
    with pytest.raises(UserError, match="acceptance 'maybe'"):
        Generator(model, acceptance="maybe")
    with pytest.raises(UserError, match="number of slots is 0"):
        Generator(model).generate([[1]], 3, slots=0)
    with pytest.raises(UserError, match="number of slots is 100000000; give 1 to 65536"):
        Generator(model).generate([[1]], 3, slots=100_000_000)
    with pytest.raises(UserError, match=r"3000000000 new tokens of 1 texts .* give at most 268435456"):
        Generator(model).generate([[1]], 3_000_000_000)
    with pytest.raises(UserError, match=r"100000000 new tokens of 4 texts .* give at most 67108864"):
        Generator(model).generate([[1]] * 3, 100_000_000)
    for seed in (-1, 2**32, 10**20):
        with pytest.raises(UserError, match=f"seed is {seed}; give a number from 0 to 4294967295"):
            Generator(model).generate([[1]], 3, seed=seed)
    with pytest.raises(UserError, match="layers"):
        DraftParts(model, layers=(0, 1))
