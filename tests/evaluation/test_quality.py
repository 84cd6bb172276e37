"""Losses by token, their ratio and its spread, agreement and ablations, against loops and definitions."""

import math
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.cells import cells

from lin_jax.attention import AttentionConfig
from lin_jax.evaluation import evaluate
from lin_jax.evaluation import token_losses as module
from lin_jax.evaluation.ablation import ablated, ablations
from lin_jax.evaluation.agreement import agreement
from lin_jax.evaluation.token_losses import TokenLosses, by_position, position_edges, ratio, token_losses
from lin_jax.models import Llama, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=12,
    num_layers=2,
    num_heads=2,
    initializer_range=0.4,
    attention=AttentionConfig(group_size=3, kernel_size=5, initial_alpha=0.3),
)
DOCUMENTS = np.array([[1, 1, 1, 1, 2, 2, 3, 3, 3], [1, 1, 1, 1, 1, 1, 0, 0, 0]], np.int32)
TOKENS = np.random.default_rng(0).integers(0, 11, DOCUMENTS.shape).astype(np.int32)
BATCH = {"tokens": TOKENS, "segment_ids": DOCUMENTS}


@pytest.fixture(scope="module")
def model():
    model = Llama(CONFIG, rngs=nnx.Rngs(0))
    taps = model.layers.layers.attention.mixer.convolution.taps
    taps[...] = jnp.asarray(np.random.default_rng(1).normal(0, 0.3, taps.shape), jnp.float32)
    return model


@pytest.mark.parametrize("logits", [2**28, 50], ids=["whole", "in pieces"])
def test_losses_are_those_of_a_loop(model, logits, monkeypatch):
    monkeypatch.setattr(module, "LOGITS", logits)
    module._losses.clear_cache()
    found = token_losses(model, [BATCH, BATCH])
    module._losses.clear_cache()
    assert found.losses.shape == (4, 8)
    every = np.asarray(model(TOKENS[:, :-1], DOCUMENTS[:, :-1]), np.float64)
    for row, t in np.ndindex(2, 8):
        document = DOCUMENTS[row, t]
        expected = 0.0
        if document and document == DOCUMENTS[row, t + 1]:
            expected = np.log(np.sum(np.exp(every[row, t]))) - every[row, t, TOKENS[row, t + 1]]
            assert found.positions[row, t] == np.sum(DOCUMENTS[row, :t] == document)
        assert found.included[row, t] == (expected > 0)
        np.testing.assert_allclose(found.losses[row, t], expected, rtol=2e-5, atol=1e-6)
    assert found.perplexity == pytest.approx(evaluate(model, [BATCH]).perplexity, rel=1e-5)


def losses_of(values, lengths=None):
    values = np.asarray(values, np.float32)
    positions = np.broadcast_to(np.arange(values.shape[1]), values.shape)
    included = positions < (values.shape[1] if lengths is None else np.asarray(lengths)[:, None])
    return TokenLosses(np.where(included, values, 0), included, positions)


def test_the_ratio_is_that_of_perplexities_and_its_interval_holds_the_truth():
    chance, held = np.random.default_rng(0), 0
    lengths = chance.integers(5, 40, 60)
    for number in range(40):
        teacher = chance.normal(2, 1, (60, 40))
        # The student loses 0.05 nats on average, and rows differ by far more than that.
        student = teacher + 0.05 + chance.normal(0, 0.1, (60, 1)) + chance.normal(0, 0.3, (60, 40))
        found = ratio(losses_of(student, lengths), losses_of(teacher, lengths), seed=number)
        whole = losses_of(student, lengths).perplexity / losses_of(teacher, lengths).perplexity
        assert found.value == pytest.approx(whole, rel=1e-5)
        assert found.low < found.value < found.high
        held += found.low <= math.exp(0.05) <= found.high
    # 38 of 40 on average.
    assert held >= 33
    same = losses_of(teacher, lengths)
    assert ratio(same, same) == module.Ratio(1.0, 1.0, 1.0)


def test_buckets_hold_every_token_once():
    chance = np.random.default_rng(0)
    teacher, student = (losses_of(chance.normal(2, 1, (3, 64)), [64, 20, 5]) for _ in range(2))
    edges = position_edges(16, 64)
    assert edges == [0, 2, 4, 8, 16, 32, 64]
    found = by_position(student, teacher, edges)
    assert [each.tokens for each in found] == [6, 6, 4 + 4 + 1, 16, 16 + 4, 32]
    assert sum(each.tokens for each in found) == np.sum(teacher.included)
    mean = sum(each.tokens * math.log(each.ratio) for each in found) / np.sum(teacher.included)
    assert math.exp(mean) == pytest.approx(student.perplexity / teacher.perplexity, rel=1e-6)
    assert position_edges(100, 250) == [0, 12, 25, 50, 100, 200, 250]
    assert position_edges(256, 64) == [0, 32, 64]


def test_agreement_counts_tokens_at_their_place():
    teacher = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 9]]
    student = [[1, 2, 3, 4], [5, 0, 7, 8, 1], [9]]
    found = agreement(teacher, student)
    assert found.equal == (4 + 3 + 1) / 10
    assert found.identical == 1 / 3
    assert (found.first_difference, found.mean_first_difference) == (1, (4 + 1 + 1) / 3)
    assert found.tokens == 10
    assert agreement(teacher, teacher).identical == 1


@pytest.mark.parametrize(
    ("branch", "name"),
    cells(
        [("memory", "flash_local+convolution"), ("convolution", "flash_global+local")],
        [("local", "flash_global+convolution")],
    ),
)
def test_a_model_without_a_branch_is_one_that_was_built_without(model, branch, name):
    assert ablations(model) == ("local", "memory", "convolution")
    other = Llama(replace(CONFIG, attention=replace(CONFIG.attention, name=name)), rngs=nnx.Rngs(3))
    source, target = (each.layers.layers.attention.mixer for each in (model, other))
    for part in ("embed", "norm", "head"):
        setattr(other, part, getattr(model, part))
    layers = nnx.merge(*nnx.split(model.layers.layers))
    if target.convolution is not None:
        target.convolution.taps[...] = source.convolution.taps[...]
    if target.alpha is not None:
        target.alpha[...] = source.alpha[...]
    layers.attention.mixer = target
    if branch == "local":
        # Built alone, the memory has no factor.
        target.alpha = source.alpha
    other.layers.layers = layers
    expected = other(TOKENS, DOCUMENTS)
    np.testing.assert_allclose(ablated(model, branch)(TOKENS, DOCUMENTS), expected, rtol=1e-5, atol=1e-6)
    assert not np.allclose(model(TOKENS, DOCUMENTS), expected, atol=1e-4)


def test_branches_around_a_base_are_left_out():
    attention = AttentionConfig("softmax+local+convolution", group_size=3, kernel_size=5, initial_alpha=1.0)
    model = Llama(replace(CONFIG, attention=attention), rngs=nnx.Rngs(0))
    assert ablations(model) == ("local", "convolution")
    bare = ablated(ablated(model, "local"), "convolution")
    plain = Llama(replace(CONFIG, attention=AttentionConfig("softmax")), rngs=nnx.Rngs(0))
    np.testing.assert_allclose(bare(TOKENS), plain(TOKENS), rtol=1e-5, atol=1e-6)
    assert ablations(plain) == ()
