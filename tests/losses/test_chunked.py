from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx
from support.cells import cells

from lin_jax.attention import AttentionConfig
from lin_jax.evaluation import perplexity
from lin_jax.evaluation.perplexity import next_token_sums
from lin_jax.models import Llama, LlamaConfig

ROWS, LENGTH, VOCABULARY = 3, 13, 23


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(VOCABULARY, 32, 48, 1, 2, attention=AttentionConfig(group_size=4, kernel_size=3))
    return Llama(config, rngs=nnx.Rngs(1))


def drawn():
    rng = np.random.default_rng(0)
    segment_ids = np.sort(rng.integers(1, 4, (ROWS, LENGTH + 1)))
    segment_ids[0, -3:] = 0
    return {"tokens": rng.integers(0, VOCABULARY, (ROWS, LENGTH + 1)), "segment_ids": segment_ids}


def with_gradient(model, batch):
    def loss(model):
        sums = next_token_sums(model, batch)
        return sums.loss[0], sums

    return jax.tree.leaves(nnx.jit(nnx.value_and_grad(loss, has_aux=True))(model))


@pytest.mark.parametrize("parts", cells([5], [2]))
def test_the_same_in_parts(model, parts, monkeypatch):
    expected = with_gradient(model, drawn())
    monkeypatch.setattr(perplexity, "LOGITS", -(-ROWS * LENGTH * VOCABULARY // parts))
    program = str(jax.make_jaxpr(partial(next_token_sums, model))(drawn()))
    assert f"f32[{ROWS},{LENGTH},{VOCABULARY}]" not in program
    for one, other in zip(with_gradient(model, drawn()), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_rows_without_documents_are_one_each(model):
    batch = drawn() | {"segment_ids": np.ones((ROWS, LENGTH + 1), int)}
    sums = jax.jit(next_token_sums)
    expected, found = sums(model, batch), sums(model, {"tokens": batch["tokens"]})
    assert int(found.tokens[0]) == ROWS * LENGTH
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
