"""First differences, and ties within rounding."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from support.samples import VOCABULARY, build_model

from lin_jax.decoding import Generator, Sampling, chain
from lin_jax.decoding.drafting.drafters.model import SelfDrafter
from lin_jax.decoding.equivalence import first_difference, is_rounding_tie
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


def test_bfloat16_parts_at_ties_alone() -> None:
    """Several nodes are rounded otherwise than a single token: texts part where logits are equal, and nowhere else."""
    model = build_model("augmented", dtype="bfloat16")
    prompts = np.random.default_rng(0).integers(0, VOCABULARY, (16, 12)).tolist()
    plain = Generator(model).generate(prompts, 100)
    drafted = Generator(model, drafter=SelfDrafter(model, (0,)), tree=chain(3)).generate(prompts, 100)
    for row, (one, other) in enumerate(zip(plain.tokens, drafted.tokens, strict=True)):
        assert one == other or is_rounding_tie(model, prompts[row], one, other, Sampling(), 0, row)
