from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from lin_jax.errors import UserError
from lin_jax.evaluation import HeadAccuracy, evaluate, head_accuracy
from lin_jax.losses.cross_entropy import shifted_targets
from lin_jax.models import Llama, LlamaConfig, MedusaHeads
from lin_jax.models.params import params_of
from lin_jax.training import RunConfig
from lin_jax.training.objective_configs import HeadsConfig
from lin_jax.training.objectives import Medusa, MedusaJoint, NextToken, PathHeadObjective
from lin_jax.training.objectives.registry import check_run

CONFIG = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=12, num_layers=1, num_heads=2)
DOCUMENTS = np.array([[1, 1, 1, 1, 2, 2, 3, 3, 3], [1, 1, 1, 1, 1, 1, 0, 0, 0]], np.int32)
TOKENS = np.random.default_rng(0).integers(0, 11, DOCUMENTS.shape).astype(np.int32)
BATCH = {"tokens": TOKENS, "segment_ids": DOCUMENTS}


@pytest.fixture(scope="module")
def model():
    return Llama(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def heads(model):
    medusa = MedusaHeads.on(model, 2)
    medusa.weight[...] = 0.3 * jax.random.normal(jax.random.key(1), medusa.weight.shape)
    return medusa


def pairs(ahead):
    """All (row, input, target) of one document, by a loop."""
    rows, length = DOCUMENTS.shape
    return [
        (row, here, here + ahead)
        for row in range(rows)
        for here in range(length - 1)
        if here + ahead < length and DOCUMENTS[row, here] == DOCUMENTS[row, here + ahead] != 0
    ]


def mean_loss(logits, ahead):
    """Mean cross entropy `[B, T, V]` over `pairs`, in float64."""
    wide = np.asarray(logits, np.float64)
    return np.mean([np.log(np.exp(wide[r, i]).sum()) - wide[r, i, TOKENS[r, t]] for r, i, t in pairs(ahead)])


@pytest.mark.parametrize("ahead", [1, 2, 3, 8])
def test_targets_stay_in_their_document(ahead):
    ids, included = shifted_targets(BATCH, ahead)
    assert ids.shape == included.shape == (2, 8)
    assert [(row, here, here + ahead) for row, here in np.argwhere(included)] == pairs(ahead)
    for row, here, there in pairs(ahead):
        assert ids[row, here] == TOKENS[row, there]


def test_language_model_loss_is_the_mean_over_targets(model):
    objective = NextToken(CONFIG)
    sums = jax.jit(objective.sums)(params_of(model), {}, BATCH)
    assert int(sums.tokens[0]) == int(objective.counts(BATCH)[0]) == len(pairs(1))
    expected = mean_loss(model(TOKENS[:, :-1], DOCUMENTS[:, :-1]), 1)
    np.testing.assert_allclose(sums.loss[0] / sums.tokens[0], expected, rtol=1e-5)


def test_perplexity_weighs_every_token_alike(model):
    rows = [{name: value[row : row + 1] for name, value in BATCH.items()} for row in range(2)]
    whole, parts = evaluate(model, [BATCH]), evaluate(model, rows)
    assert whole.tokens == parts.tokens == len(pairs(1))
    np.testing.assert_allclose(parts.loss, whole.loss, rtol=1e-5)
    np.testing.assert_allclose(whole.perplexity, np.exp(whole.loss))


def test_medusa_heads_predict_the_token_m_plus_two_ahead(model, heads):
    objective = Medusa(CONFIG, 2, 0.8)
    assert objective.coefficients == (1.0, 0.8)
    sums = jax.jit(objective.sums)(params_of(heads), params_of(model), BATCH)
    logits = heads(model.hidden(TOKENS[:, :-1], DOCUMENTS[:, :-1]))
    for head in range(2):
        assert int(sums.tokens[head]) == len(pairs(head + 2))
        expected = mean_loss(logits[:, :, head], head + 2)
        np.testing.assert_allclose(sums.loss[head] / sums.tokens[head], expected, rtol=1e-5)


@pytest.mark.parametrize("ahead", [1, 3, 8])
def test_without_documents_every_target_in_the_row_counts(ahead):
    ids, included = shifted_targets({"tokens": TOKENS}, ahead)
    assert included.sum() == 2 * (9 - ahead)
    np.testing.assert_array_equal(ids[:, : 9 - ahead], TOKENS[:, ahead:])
    assert included[:, : 9 - ahead].all()


@pytest.mark.thorough
def test_rows_without_documents_are_rows_of_one_document(model, heads):
    plain = {"tokens": TOKENS}
    marked = {"tokens": TOKENS, "segment_ids": np.ones_like(TOKENS)}
    params, medusa = params_of(model), Medusa(CONFIG, 2, 0.8)
    joint = MedusaJoint(CONFIG, 2, HeadsConfig(learning_rate_factor=1.0, warmup_steps=0))
    path = PathHeadObjective(CONFIG, 4, 2, 0.8)
    both = {"model": params, "heads": params_of(heads)}
    for objective, learning, frozen in (
        (NextToken(CONFIG), params, {}),
        (medusa, params_of(heads), params),
        (joint, both, {}),
        (path, path.start(jax.random.key(0), model), params),
    ):
        ours, theirs = (jax.jit(objective.sums)(learning, frozen, batch) for batch in (plain, marked))
        np.testing.assert_array_equal(ours.tokens, objective.counts(plain))
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-5)
    assert evaluate(model, [plain]).tokens == 16
    ours, theirs = (head_accuracy(model, heads, [batch], depth=2) for batch in (plain, marked))
    np.testing.assert_array_equal(ours.table, theirs.table)


def test_medusa_sends_no_gradient_into_the_base(model, heads):
    objective = Medusa(CONFIG, 2, 0.8)
    loss = jax.jit(jax.grad(lambda frozen: objective.sums(params_of(heads), frozen, BATCH).loss.sum()))
    gradient = loss(params_of(model))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_head_accuracy_counts_exact_ranks(model, heads, tmp_path):
    accuracy = head_accuracy(model, heads, [BATCH, BATCH], depth=2, ranks=4)
    logits = np.asarray(heads(model.hidden(TOKENS[:, :-1], DOCUMENTS[:, :-1])))
    for head in range(2):
        order = np.argsort(-logits[:, :, head], axis=-1, kind="stable")
        places = [list(order[r, i]).index(TOKENS[r, t]) for r, i, t in pairs(head + 2)]
        expected = [np.mean(np.array(places) == rank) for rank in range(4)]
        np.testing.assert_allclose(accuracy.table[head], expected)
        assert accuracy.counts[head] == 2 * len(places)
    # What the model would choose after the text, in the place of what comes.
    likeliest = np.asarray(model.logits(model.hidden(TOKENS[:, :-1], DOCUMENTS[:, :-1]))).argmax(axis=-1)
    for head in range(2):
        order = np.argsort(-logits[:, :, head], axis=-1, kind="stable")
        places = [list(order[r, i]).index(likeliest[r, t - 1]) for r, i, t in pairs(head + 2)]
        np.testing.assert_allclose(accuracy.chosen[head], [np.mean(np.array(places) == rank) for rank in range(4)])
    np.testing.assert_array_equal(accuracy.accepted, accuracy.chosen)
    assert "what the model itself would choose there:" in str(accuracy)
    accuracy.save(tmp_path / "table.json")
    np.testing.assert_allclose(HeadAccuracy.load(tmp_path / "table.json").accepted, accuracy.chosen)
    # As earlier versions wrote it.
    replace(accuracy, chosen=None).save(tmp_path / "table.json")
    np.testing.assert_allclose(HeadAccuracy.load(tmp_path / "table.json").accepted, accuracy.table)


def test_head_accuracy_against_given_tokens(model, heads):
    hidden = model.hidden(TOKENS[:, :-1], DOCUMENTS[:, :-1])
    truth = TOKENS.copy()
    truth[:, 2:] = np.argmax(heads(hidden), axis=-1)[:, :-1, 0]
    accuracy = head_accuracy(model, heads, [{**BATCH, "truth": truth}], depth=2)
    np.testing.assert_allclose(accuracy.table[0], [1.0] + [0.0] * 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "nothing"}, "objective 'nothing' is unknown"),
        ({"objective": "medusa"}, "needs init_from"),
        ({"objective": "medusa", "init_from": "x", "heads": HeadsConfig(depth=256)}, "sequence_length 256 leaves"),
    ],
)
def test_contradicting_options(options, message):
    with pytest.raises(UserError, match=message):
        check_run(RunConfig(output="x", **options))
