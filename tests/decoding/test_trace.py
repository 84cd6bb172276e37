"""Steps of decoding one by one: together they are what a generator writes, and each is a path of its tree."""

from dataclasses import replace

import numpy as np
import pytest
from flax import nnx

from lin_jax.decoding import DynamicTree, Generator, NgramDrafter
from lin_jax.decoding.trace import traced_steps
from lin_jax.errors import UserError
from lin_jax.models import Llama


def test_steps_are_those_of_a_generator(tiny_model):
    model = Llama(replace(tiny_model, num_layers=1, vocab_size=5, initializer_range=0.3), rngs=nnx.Rngs(0))
    generator = Generator(model, drafter=NgramDrafter(depth=4, matches=4), tree=DynamicTree(8, 4))
    prompt = np.random.default_rng(0).integers(0, 5, 12).tolist()
    steps = list(traced_steps(generator, prompt, 30))
    whole = generator.generate([prompt], 30)
    assert [steps[0].tokens[0], *(token for step in steps for token in step.emitted)] == whole.tokens[0]
    assert len(steps) == whole.steps[0] < 29
    assert any(len(step.accepted) > 2 for step in steps)
    for step, after in zip(steps, [*steps[1:], None], strict=True):
        drafted = [step.tokens[node] for node in step.accepted[1:]]
        assert step.accepted[0] == 0
        assert [step.parents[node] for node in step.accepted] == [-1, *step.accepted[:-1]]
        if after is None:
            assert step.emitted == (*drafted, *step.emitted[len(drafted) :])[: len(step.emitted)]
        else:
            assert list(step.emitted[:-1]) == drafted
            assert after.tokens[0] == step.emitted[-1]
    with pytest.raises(UserError, match="the prompt is empty"):
        next(traced_steps(generator, [], 3))
