import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from lin_jax.attention import AttentionConfig
from lin_jax.errors import UserError
from lin_jax.models.params import params_of
from lin_jax.training import OptimizerConfig, load_heads, load_model, load_run_config, read_base
from lin_jax.training.checkpoint.files import read_metadata, saved_steps
from lin_jax.training.checkpoint.manager import Checkpoints
from lin_jax.training.checkpoint.metadata import CheckpointMetadata
from lin_jax.training.monitoring.throughput import MACHINE_FIGURES
from lin_jax.training.monitoring.trackers import read_metrics
from lin_jax.training.run import train
from lin_jax.training.setup import resolve


@pytest.fixture
def copied(base_run, tmp_path):
    """The finished run, to be damaged."""
    return Path(shutil.copytree(base_run, tmp_path / "run"))


@pytest.fixture(scope="module")
def heads_run(base_run, tiny_run):
    folder = base_run.parent / "heads"
    optimizer = OptimizerConfig(learning_rate=0.003, warmup_steps=2, weight_decay=0.0)
    train(tiny_run(folder, objective="medusa", init_from=str(base_run), optimizer=optimizer, steps=40))
    return folder


def leaves(*trees):
    return [np.array(leaf) for tree in trees for leaf in jax.tree.leaves(tree)]


def truncate(folder):
    """Cuts every file of a checkpoint's arrays short, as a full disk would."""
    files = [path for path in (folder / "model").rglob("*") if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_finished_run_has_its_files(base_run):
    assert saved_steps(base_run) == [8, 12]
    assert (base_run / "tokenizer" / "tokenizer.json").exists()
    assert list((base_run / "tensorboard").iterdir())
    lines = read_metrics(base_run / "metrics.jsonl")
    train_lines = [line for line in lines if "loss" in line]
    assert [line["step"] for line in train_lines] == list(range(1, 13))
    own = {"step", "tokens", "loss", "perplexity", "learning_rate", "grad_norm", "spikes", "left_out", "roll_backs"}
    assert set(train_lines[0]) == own | MACHINE_FIGURES - {"mfu"}
    assert train_lines[-1]["tokens"] == 12 * 4 * 24
    validations = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in validations] == [0, 6, 12]
    assert validations[0]["validation_perplexity"] == pytest.approx(280, rel=0.1)
    assert validations[-1]["validation_loss"] < validations[0]["validation_loss"]


def test_the_saved_configuration_is_complete(base_run, tiny_run):
    saved = load_run_config(base_run)
    config = tiny_run(base_run)
    assert saved == replace(config, model=replace(config.model, vocab_size=280))


def test_round_trip_of_model_optimizer_key_and_data(tmp_path, tiny_run):
    run = resolve(tiny_run(tmp_path / "run"), resume=False)
    state = run.state
    for _ in range(3):
        state, _ = run.step(state, run.frozen, next(run.batches))
    expected = leaves(state.params, state.optimizer, state.step, state.history, jax.random.key_data(state.key))
    with Checkpoints(run.folder) as checkpoints:
        checkpoints.save(3, state, run.batches.get_state(), run.metadata)
        # The saved state is given away while it is being written.
        state, figures = run.step(state, run.frozen, next(run.batches))
    fresh = resolve(tiny_run(tmp_path / "run"), resume=True)
    with Checkpoints(run.folder) as checkpoints:
        restored = checkpoints.restore_latest(fresh.state, fresh.metadata)
    own = restored.state
    found = leaves(own.params, own.optimizer, own.step, own.history, jax.random.key_data(own.key))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    fresh.batches.set_state(restored.data)
    _, again = run.step(own, fresh.frozen, next(fresh.batches))
    assert float(again.loss) == float(figures.loss)


def test_load_model_gives_the_newest_or_the_named_step(base_run):
    model, config, step = load_model(base_run)
    assert step == 12
    assert config.output == str(base_run)
    older, _, step = load_model(base_run, 8)
    assert step == 8
    assert not np.array_equal(model.norm.scale[...], older.norm.scale[...])
    assert model(np.zeros((1, 4), np.int32)).shape == (1, 4, 280)
    with pytest.raises(UserError, match="has no checkpoint of step 7; it has 8, 12"):
        load_model(base_run, 7)


def test_a_damaged_newest_checkpoint_falls_back_aloud(copied, base_run, tiny_run, caplog):
    truncate(copied / "checkpoints" / "12")
    with caplog.at_level(logging.WARNING):
        _, _, step = load_model(copied)
    assert step == 8
    assert "12 cannot be read, trying the one before" in caplog.text
    caplog.clear()
    train(tiny_run(copied, steps=12), resume=True)
    assert "12 cannot be read, trying the one before" in caplog.text
    assert saved_steps(copied) == [8, 12]
    assert (copied / "unreadable" / "12").exists()
    again, whole = (
        [(line["step"], line["loss"]) for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
        for run in (copied, base_run)
    )
    assert again == whole


def test_without_any_readable_checkpoint_nothing_starts_anew(copied, tiny_run):
    for step in (8, 12):
        truncate(copied / "checkpoints" / str(step))
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read"):
        train(tiny_run(copied), resume=True)
    assert read_metrics(copied / "metrics.jsonl")[-1]["step"] == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 32}, r"model.hidden_size is 16 there and 32 here.*embed/embedding is float32\[280,16\] there"),
        ({"attention": AttentionConfig(name="softmax")}, "model.attention.name is augmented there and softmax here"),
        ({"num_layers": 3}, "model.num_layers is 2 there and 3 here"),
    ],
)
def test_a_checkpoint_of_another_model_lists_what_differs(base_run, tiny_model, tiny_run, change, message):
    with pytest.raises(UserError, match=message):
        train(tiny_run(base_run, model=replace(tiny_model, **change)), resume=True)
    assert saved_steps(base_run) == [8, 12]


def test_options_that_change_nothing_may_change(base_run, tiny_model, tiny_run):
    run = resolve(tiny_run(base_run, model=replace(tiny_model, remat=True, unroll=2)), resume=True)
    run.metadata.demand_equal(read_metadata(base_run, 12), base_run)


def test_starting_over_checkpoints_needs_resume(base_run, tmp_path, tiny_run):
    with pytest.raises(UserError, match="already holds checkpoints up to step 12; add --resume"):
        train(tiny_run(base_run))
    with pytest.raises(UserError, match=r"there is no checkpoint in .* leave --resume out"):
        train(tiny_run(tmp_path / "new"), resume=True)


def test_a_model_can_begin_from_another_with_a_different_mixer(base_run, tmp_path, tiny_model, tiny_run):
    softmax = replace(tiny_model, attention=AttentionConfig(name="softmax"))
    run = resolve(tiny_run(tmp_path / "new", model=softmax, init_from=str(base_run)), resume=False)
    base = params_of(load_model(base_run)[0])
    np.testing.assert_array_equal(run.state.params["embed"]["embedding"], base["embed"]["embedding"])
    wide = replace(tiny_model, intermediate_size=40)
    with pytest.raises(UserError, match=r"init_from holds another model: .*gate/kernel"):
        resolve(tiny_run(tmp_path / "other", model=wide, init_from=str(base_run)), resume=False)


@pytest.mark.thorough
def test_medusa_heads_learn_on_a_base_that_stays(base_run, heads_run):
    lines = read_metrics(heads_run / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    validation = [line for line in lines if "validation_loss" in line]
    assert validation[-1]["validation_loss"] < validation[0]["validation_loss"]
    assert {"validation_accuracy_head_0", "validation_accuracy_head_1"} <= set(validation[0])
    table = json.loads((heads_run / "head_accuracy.json").read_text())
    assert np.shape(table["table"]) == (2, 10)
    assert table["table"][0][0] == pytest.approx(validation[-1]["validation_accuracy_head_0"])
    base = read_base(heads_run)
    assert (base.folder, base.step) == (base_run, 12)


@pytest.mark.thorough
def test_heads_hold_no_copy_of_the_base(heads_run):
    metadata = json.loads((heads_run / "checkpoints" / "40" / "about" / "metadata").read_text())
    assert set(metadata["parameters"]) == {"weight", "bias", "output"}
    assert metadata["base"]["run"] == "../base"


def test_load_heads_knows_its_model(base_run, heads_run):
    model, _, _ = load_model(base_run)
    assert load_heads(heads_run, model=model).count == 2
    with pytest.raises(UserError, match=r"belong to step 12 of .*base, and this is another model"):
        load_heads(heads_run, model=load_model(base_run, 8)[0])
    with pytest.raises(UserError, match=r"holds Medusa heads, not a model; its model is in .*base"):
        load_model(heads_run)
    with pytest.raises(UserError, match="holds no draft heads; train some with objective medusa or path"):
        load_heads(base_run)


def test_medusa_goes_on_with_the_step_it_began_with(heads_run, base_run, tmp_path, tiny_run):
    for folder in (base_run, heads_run):
        shutil.copytree(folder, tmp_path / folder.name)
    shutil.copytree(base_run / "checkpoints" / "8", tmp_path / "base" / "checkpoints" / "20")
    heads = tmp_path / "heads"
    run = resolve(tiny_run(heads, objective="medusa", init_from=str(tmp_path / "base")), resume=True)
    assert run.metadata.base["step"] == read_base(heads).step == 12
    run.metadata.demand_equal(read_metadata(heads, 40), heads)
    shutil.rmtree(tmp_path / "base" / "checkpoints" / "12")
    with pytest.raises(UserError, match="has no checkpoint of step 12; it has 8, 20"):
        resolve(run.config, resume=True)


def test_options_that_came_later_are_in_no_older_checkpoint(tmp_path):
    old = CheckpointMetadata("language_model", {"width": 8, "rotary": {"base": 1.0}}, "t", {})
    new = replace(old, model={"width": 8, "rotary": {"base": 1.0, "factor": None}, "window": None, "unroll": 2})
    new.demand_equal(old, tmp_path)
    with pytest.raises(UserError, match=r"model\.window"):
        replace(new, model=new.model | {"window": 64}).demand_equal(old, tmp_path)
