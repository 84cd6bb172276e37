import json
import random
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from support.shared_state import METADATA, state_of, whole

from lin_jax.cli.hub.options import main as hub
from lin_jax.errors import UserError
from lin_jax.hub import from_pretrained
from lin_jax.session import Session
from lin_jax.training import TrainingConfig, load_model
from lin_jax.training.checkpoint.files import saved_steps, validation_losses
from lin_jax.training.checkpoint.manager import Checkpoints
from lin_jax.training.checkpoint.manifest import seal
from lin_jax.training.checkpoint.retention import newest_and_best
from lin_jax.training.monitoring.trackers import read_metrics


def save(checkpoints, *steps, losses=()):
    losses = dict(losses)
    for step in steps:
        checkpoints.save(step, state_of(step), {"read": step}, METADATA, losses.get(step))
        checkpoints.wait()


@pytest.mark.parametrize("seed", range(20))
def test_the_newest_and_the_best_stay(seed):
    chance = random.Random(seed)
    newest, best = chance.randint(1, 3), chance.randint(0, 3)
    steps = sorted(chance.sample(range(100), chance.randint(1, 8)))
    losses = {step: float(chance.randint(1, 4)) for step in steps if chance.random() < 0.7}
    kept = newest_and_best(newest, best, losses).should_preserve(
        [SimpleNamespace(step=step) for step in steps], context=None
    )
    for step, stays in zip(steps, kept, strict=True):
        newer = sum(other > step for other in steps)
        better = sum((loss, -other) < (losses.get(step, np.inf), -step) for other, loss in losses.items())
        assert stays == (newer < newest or (step in losses and better < best))


def test_the_best_outlives_newer_ones_and_the_process(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 5: float("nan"), 6: 0.5}
    with Checkpoints(tmp_path, keep=1, keep_best=1) as checkpoints:
        save(checkpoints, 1, 2, 3, 4, losses=losses.items())
    assert saved_steps(tmp_path) == [2, 4]
    assert validation_losses(tmp_path) == {2: 1.0}
    with Checkpoints(tmp_path, keep=1, keep_best=1) as checkpoints:
        save(checkpoints, 5, losses=losses.items())
        assert saved_steps(tmp_path) == [2, 5]
        save(checkpoints, 6, 7, losses=losses.items())
    assert saved_steps(tmp_path) == [6, 7]


def test_a_damaged_loss_makes_no_best(tmp_path):
    with Checkpoints(tmp_path, keep=1, keep_best=1) as checkpoints:
        save(checkpoints, 1, 2, losses={1: 1.0, 2: 2.0}.items())
    label = tmp_path / "checkpoints" / "1" / "about" / "metadata"
    label.write_text(label.read_text().replace('"validation_loss": 1.0', '"validation_loss": 0.0'))
    assert validation_losses(tmp_path) == {2: 2.0}
    with Checkpoints(tmp_path, keep=1, keep_best=1) as checkpoints:
        save(checkpoints, 3)
    assert saved_steps(tmp_path) == [2, 3]


def test_going_back_in_the_middle_of_a_run(tmp_path):
    with Checkpoints(tmp_path, keep_best=1) as checkpoints:
        save(checkpoints, 2, 4, 6, losses={4: 2.0, 6: 1.0}.items())
        # The newest is still being written when its loss turns out to be a bad one.
        checkpoints.save(8, state_of(8), {"read": 8}, METADATA)
        restored = checkpoints.restore_before(6, state_of(8), METADATA)
        assert (restored.step, restored.data, whole(restored.state)) == (4, {"read": 4}, whole(state_of(4)))
        assert saved_steps(tmp_path) == [2, 4]
        assert sorted(path.name for path in (tmp_path / "rolled_back").iterdir()) == ["6", "8"]
        save(checkpoints, 6, 8)
        assert saved_steps(tmp_path) == [2, 4, 6, 8]
        assert list(validation_losses(tmp_path)) == [4]
        assert checkpoints.restore(4, state_of(8), METADATA).step == 4
        assert (tmp_path / "rolled_back" / "8.1").exists()
        assert checkpoints.restore_latest(state_of(8), METADATA).step == 4
        with pytest.raises(UserError, match=r"there is no checkpoint in .* before step 2;"):
            checkpoints.restore_before(2, state_of(8), METADATA)
        with pytest.raises(UserError, match=r"there is no checkpoint in .* of step 3;"):
            checkpoints.restore(3, state_of(8), METADATA)
        with pytest.raises(UserError, match="is a checkpoint of another model: tokenizer is t there and u here"):
            checkpoints.restore_before(4, state_of(8), replace(METADATA, tokenizer="u"))


@pytest.mark.thorough
def test_a_validation_that_is_due_comes_before_the_checkpoint(base_run):
    line = next(line for line in read_metrics(base_run / "metrics.jsonl") if line["step"] == 12 and len(line) == 3)
    assert validation_losses(base_run) == {12: line["validation_loss"]}
    assert load_model(base_run, "best")[2] == 12


@pytest.mark.thorough
def test_the_best_model_is_loaded_by_name(base_run, tmp_path, caplog):
    run = shutil.copytree(base_run, tmp_path / "run")
    label = run / "checkpoints" / "8" / "about" / "metadata"
    label.write_text(json.dumps(json.loads(label.read_text()) | {"validation_loss": 0.1}))
    seal(run / "checkpoints" / "8")
    older, _, step = load_model(run, "best")
    assert step == 8
    assert load_model(run)[2] == 12
    assert hub(["export", str(run), str(tmp_path / "out"), "--step", "best"]) == 0
    for model in (Session.load(run, step="best").model, from_pretrained(tmp_path / "out")):
        np.testing.assert_array_equal(model.norm.scale[...], older.norm.scale[...])
    shutil.rmtree(run / "checkpoints" / "8" / "model" / "d")
    assert load_model(run, "best")[2] == 12
    assert "8 cannot be read, trying the next best: model/d/" in caplog.text
    with pytest.raises(UserError, match=r"checkpoints/8 is damaged: model/d/.* is missing; .* has steps 8, 12"):
        load_model(run, 8)
    shutil.rmtree(run / "checkpoints" / "12")
    label.write_text(json.dumps(json.loads(label.read_text()) | {"validation_loss": None}))
    seal(run / "checkpoints" / "8")
    with pytest.raises(UserError, match="none is known to be the best; leave 'best' out to take the newest"):
        load_model(run, "best")


def test_how_many_stay_is_checked():
    assert TrainingConfig(keep_best=0).keep_best == 0
    with pytest.raises(UserError, match=r"training.keep_best is -1; give 0 or more"):
        TrainingConfig(keep_best=-1)
