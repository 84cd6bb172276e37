"""Memories fitted to a teacher before the first step: which layers, from what, and what becomes of the run."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.cells import cells

from lin_jax.attention import AttentionConfig
from lin_jax.models import Llama, LlamaConfig
from lin_jax.models.params import params_of
from lin_jax.training import RunConfig
from lin_jax.training.initialization.fitted_start import describe, fitted_start
from lin_jax.training.model_source import with_attention
from lin_jax.training.objective_configs import TransferConfig
from lin_jax.training.objectives.registry import objective_of

WINDOW = AttentionConfig("clustered+window", window=4, features=6)
CONFIG = LlamaConfig(
    vocab_size=17,
    hidden_size=16,
    intermediate_size=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    # Attention that is far from even, so that there is something to fit.
    initializer_range=0.6,
    attention=AttentionConfig("softmax"),
)
TOKENS = np.random.default_rng(0).integers(0, 17, (3, 33)).astype(np.int32)
BATCH = {"tokens": TOKENS}


@pytest.fixture(scope="module")
def teacher():
    return Llama(CONFIG, rngs=nnx.Rngs(0))


def transfer(model, teacher, layers=None):
    """What a layer misses of what the teacher's says, in each."""
    run = RunConfig(
        output="unused",
        init_from="base",
        objective="attention_transfer",
        model=model.config,
        transfer=TransferConfig(learns=("mixer",), layers=layers),
    )
    objective = objective_of(run)
    params, frozen = objective.start(jax.random.key(0), model), objective.frozen(model)
    sums = jax.jit(objective.sums)(params, {**frozen, "teacher": teacher}, BATCH)
    return np.asarray(sums.loss)


def test_fitted_layers_miss_less_than_they_did(teacher):
    student = with_attention(teacher, WINDOW)
    before = jax.tree.map(np.asarray, params_of(student))
    found = fitted_start(student, teacher, BATCH, None, 0)
    assert sorted(found.shares) == [0, 1, 2]
    assert "memories of 3 layers" in describe(found.shares)
    errors = [transfer(each, teacher)[:3] for each in (student, found.model)]
    assert np.all(errors[1] < errors[0])
    alone = transfer(with_attention(teacher, AttentionConfig("softmax", window=4)), teacher)[:3]
    assert np.all(errors[1] < alone)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, params_of(student)))


def test_a_memory_fitted_over_a_context_serves_rows_that_begin_further_on(teacher, monkeypatch):
    student = with_attention(teacher, WINDOW)
    near = fitted_start(student, teacher, BATCH, None, 0).model
    far = fitted_start(student, teacher, BATCH, None, 0, context_length=300).model
    begin = Llama.begin
    monkeypatch.setattr(Llama, "begin", lambda self, tokens, positions: begin(self, tokens, positions + 268))
    assert np.sum(transfer(far, teacher)[:3]) < np.sum(transfer(near, teacher)[:3])


def test_what_has_learnt_and_what_does_not_learn_stays(teacher):
    student = with_attention(teacher, WINDOW)
    mixer = student.layers.layers.attention.mixer
    mixer.balance[...] = mixer.balance[...].at[1].set(0.5)
    found = fitted_start(student, teacher, BATCH, (0, 2), 0)
    assert sorted(found.shares) == [0]
    for old, new in zip(*(jax.tree.leaves(params_of(each)["layers"]) for each in (student, found.model)), strict=True):
        np.testing.assert_array_equal(old[1:], new[1:])


@pytest.mark.parametrize("place", cells([0], [1, 2]))
def test_layers_of_a_mix_are_fitted_as_they_are_alone(teacher, place):
    alike = fitted_start(with_attention(teacher, WINDOW), teacher, BATCH, None, 0).model
    mixed = AttentionConfig(WINDOW.name, window=4, features=6, layers={place: "softmax"})
    found = fitted_start(with_attention(teacher, mixed), teacher, BATCH, None, 0)
    assert sorted(found.shares) == [number for number in range(3) if number != place]
    kind = 1 if place == 0 else 0
    own = found.model.layers.mixers[kind]
    kept = [number for number in range(3) if number != place]
    expected = alike.layers.layers.attention.mixer.balance[...][jnp.asarray(kept)]
    np.testing.assert_allclose(own.balance[...], expected, rtol=1e-4, atol=1e-5)


def test_a_teacher_of_another_attention_is_not_taken(teacher):
    other = with_attention(teacher, AttentionConfig("softmax", window=8))
    assert not fitted_start(with_attention(teacher, WINDOW), other, BATCH, None, 0).shares
    assert not fitted_start(with_attention(teacher, AttentionConfig()), teacher, BATCH, None, 0).shares


@pytest.mark.thorough
def test_bfloat16_keeps_its_type(teacher):
    student = with_attention(teacher, WINDOW)
    low = Llama(replace(student.config, dtype="bfloat16", param_dtype="bfloat16"), rngs=nnx.Rngs(0))
    theirs = Llama(replace(teacher.config, dtype="bfloat16", param_dtype="bfloat16"), rngs=nnx.Rngs(0))
    found = fitted_start(low, theirs, BATCH, (0, 1), 0)
    assert {leaf.dtype for leaf in jax.tree.leaves(params_of(found.model))} == {jnp.dtype("bfloat16")}
    assert np.all(np.isfinite(np.asarray(found.shares[0].after, np.float32)))
