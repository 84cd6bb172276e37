"""A model and its heads learning together: the loss, who learns when and how fast, and what a run's folder holds."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax.attention import AttentionConfig
from lin_jax.cli.hub.commands import export_run
from lin_jax.errors import UserError
from lin_jax.hub.medusa import has_heads
from lin_jax.models import Llama, LlamaConfig, MedusaHeads
from lin_jax.training import OptimizerConfig, RunConfig, TrainingConfig, load_heads, load_model
from lin_jax.training.monitoring.trackers import read_metrics
from lin_jax.training.objective_configs import HeadsConfig
from lin_jax.training.objectives import Medusa, MedusaJoint, NextToken
from lin_jax.training.objectives.registry import check_run
from lin_jax.training.optimizer import build_optimizer
from lin_jax.training.run import train
from lin_jax.training.train_step import TrainState, accumulate_gradients, make_step

CONFIG = LlamaConfig(
    vocab_size=13,
    hidden_size=8,
    intermediate_size=12,
    num_layers=1,
    num_heads=2,
    attention=AttentionConfig(group_size=4, kernel_size=5),
)
WARMUP, FACTOR = 3, 4.0
OBJECTIVE = MedusaJoint(CONFIG, 2, HeadsConfig(learning_rate_factor=FACTOR, warmup_steps=WARMUP))
OPTIMIZER = OptimizerConfig(learning_rate=0.01, warmup_steps=0, min_lr_ratio=1.0)
BATCH = {
    "tokens": np.random.default_rng(0).integers(0, 13, (4, 9)).astype(np.int32),
    "segment_ids": np.sort(np.random.default_rng(1).integers(0, 3, (4, 9)), axis=1)[:, ::-1].astype(np.int32),
}


gradients_of = jax.jit(accumulate_gradients, static_argnums=(0, 1))


@jax.jit
def own_sums(params):
    return NextToken(CONFIG).sums(params, {}, BATCH)


@pytest.fixture(scope="module")
def params():
    """Initial ones, but for the heads' blocks, which are random."""
    made = OBJECTIVE.start(jax.random.key(0), Llama(CONFIG, rngs=nnx.Rngs(0)))
    made["heads"]["weight"] += 0.3 * jax.random.normal(jax.random.key(2), made["heads"]["weight"].shape)
    return made


def test_the_loss_is_the_models_and_a_share_of_the_heads(params):
    """The same numbers as the two objectives apart, weighted as Medusa-2 has it."""
    loss, sums, gradients = gradients_of(OBJECTIVE, 2, params, {}, BATCH)
    own = own_sums(params["model"])
    heads = jax.jit(Medusa(CONFIG, 2, 0.8).sums)(params["heads"], params["model"], BATCH)
    means = [own.loss[0] / own.tokens[0], *(heads.loss / heads.tokens)]
    np.testing.assert_allclose(loss, np.dot([1, 0.2, 0.2 * 0.8], means), rtol=1e-5)
    np.testing.assert_array_equal(sums.tokens, [*own.tokens, *heads.tokens])
    figures = OBJECTIVE.figures(jax.device_get(sums))
    assert figures["perplexity"] == pytest.approx(np.exp(means[0]), rel=1e-5)
    assert figures["accuracy_head_1"] == pytest.approx(heads.correct[1] / heads.tokens[1])
    # Unlike on a frozen model, what the heads want reaches the model.
    alone = jax.jit(jax.grad(lambda model: own_sums(model).loss[0] / own.tokens[0]))(params["model"])
    assert not np.allclose(gradients["model"]["embed"]["embedding"], alone["embed"]["embedding"], rtol=1e-3)


@pytest.mark.thorough
def test_the_model_stays_to_the_bit_until_the_heads_are_warm(params):
    optimizer = build_optimizer(OPTIMIZER, 10, OBJECTIVE.rates)
    first, step = jax.tree.map(np.array, params), make_step(OBJECTIVE, optimizer)
    state = TrainState.new(jax.tree.map(jnp.array, params), optimizer, jax.random.key(1))
    for number in range(1, WARMUP + 2):
        before = jax.tree.map(np.array, state.params)
        state, figures = step(state, {}, BATCH)
        changed = {
            part: [bool((new != old).any()) for new, old in zip(*map(jax.tree.leaves, pair), strict=True)]
            for part, pair in ((part, (state.params[part], before[part])) for part in ("model", "heads"))
        }
        assert figures.health.finite
        assert any(changed["heads"])
        assert any(changed["model"]) == (number > WARMUP)
        if number <= WARMUP:
            jax.tree.map(np.testing.assert_array_equal, state.params["model"], first["model"])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_heads_learn_four_times_as_fast(params, weight_decay):
    """From the same state, an update of the heads is four times that without rates, and the model's is the same."""
    options = replace(OPTIMIZER, weight_decay=weight_decay)
    gradients = gradients_of(OBJECTIVE, 2, params, {}, BATCH)[2]
    updates = []
    for rates in (MedusaJoint(CONFIG, 2, HeadsConfig(learning_rate_factor=FACTOR, warmup_steps=0)).rates, None):
        transformation = build_optimizer(options, 10, rates).transformation
        updates.append(jax.jit(transformation.update)(gradients, transformation.init(params), params)[0])
    ours, plain = updates
    jax.tree.map(np.testing.assert_array_equal, ours["model"], plain["model"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, FACTOR * b, rtol=1e-6), ours["heads"], plain["heads"])
    assert all(np.any(leaf) for leaf in jax.tree.leaves(plain["heads"]))


@pytest.fixture(scope="module")
def joint_run(base_run, tiny_run):
    folder = base_run.parent / "joint"
    train(tiny_run(folder, objective="medusa_joint", init_from=str(base_run)))
    return folder


@pytest.mark.thorough
def test_a_run_holds_both_and_reports_both(joint_run, base_run):
    model, config, step = load_model(joint_run)
    heads = load_heads(joint_run, model=model)
    assert (config.objective, step, heads.count) == ("medusa_joint", 12, 2)
    assert isinstance(heads, MedusaHeads)
    assert model(np.zeros((1, 4), np.int32)).shape == (1, 4, 280)
    names = {"validation_loss", "validation_perplexity", "validation_accuracy_head_0", "validation_accuracy_head_1"}
    lines = [line for line in read_metrics(joint_run / "metrics.jsonl") if "validation_loss" in line]
    assert names | {"step"} == set(lines[-1])
    table = json.loads((joint_run / "head_accuracy.json").read_text())["table"]
    assert table[1][0] == pytest.approx(lines[-1]["validation_accuracy_head_1"])
    with pytest.raises(UserError, match=r"belong to the model beside them at step 12, and this is another model"):
        load_heads(joint_run, model=load_model(base_run)[0])


@pytest.mark.thorough
def test_it_exports_with_its_heads(joint_run, tmp_path):
    export_run(str(joint_run), str(tmp_path / "out"))
    assert has_heads(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_from": None}, "objective 'medusa_joint' needs init_from"),
        ({"loss_weight": 0.0}, "heads.loss_weight is 0.0; give a positive number"),
        ({"learning_rate_factor": -1.0}, "heads.learning_rate_factor is -1.0; give a positive number"),
        ({"warmup_steps": -1}, "heads.warmup_steps is -1; give 0 or more"),
        ({"warmup_steps": 20}, "heads.warmup_steps is 20; .* fewer than the 20 of training.steps"),
    ],
)
def test_contradicting_options(options, message):
    def check(init_from="x", **heads):
        given = {"heads": HeadsConfig(**{"warmup_steps": 5} | heads), "training": TrainingConfig(steps=20)}
        check_run(RunConfig("x", objective="medusa_joint", init_from=init_from, **given))

    with pytest.raises(UserError, match=message):
        check(**options)
