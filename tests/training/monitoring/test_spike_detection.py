"""A run that meets trouble leaves out or undoes what is bad, goes on, and does so again when it is resumed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.planted import Killed, killed_at, lines_of, planted

from lin_jax.errors import UserError, exit_cleanly
from lin_jax.models.params import params_of
from lin_jax.training import load_model
from lin_jax.training.checkpoint.files import saved_steps
from lin_jax.training.monitoring.spike_detection import Counts, LossHistory, LossSpikesConfig, check_step, median
from lin_jax.training.monitoring.trackers import read_metrics
from lin_jax.training.monitoring.watchdog import MonitoringConfig
from lin_jax.training.optimizer import OptimizerConfig
from lin_jax.training.run import train

NAN = float("nan")


@pytest.mark.parametrize("known", [0, 1, 2, 5, 8])
def test_the_median_is_of_what_is_known(known):
    values = np.full(8, np.inf, np.float32)
    values[8 - known :] = np.random.default_rng(known).normal(size=known)
    expected = np.median(values[8 - known :]) if known else np.inf
    np.testing.assert_allclose(median(jnp.asarray(values), jnp.asarray(known)), expected, rtol=1e-6)


def verdict_by_hand(config, losses, norms, loss, norm):
    """The rule in NumPy, on lists of what was ordinary: limits and whether there is a spike."""
    losses, norms = losses[-config.window :], norms[-config.window :]
    if len(losses) < config.window // 2:
        return np.inf, np.inf, False
    middle = np.median(losses)
    deviation = max(1.4826 * np.median(np.abs(np.array(losses) - middle)), 0.01 * abs(middle))
    limits = middle + config.spike_factor * deviation, config.norm_factor * np.median(norms)
    return *limits, np.isfinite([loss, norm]).all() and (loss > limits[0] or norm > limits[1])


@pytest.mark.parametrize("on_spike", ["ignore", "skip"])
def test_verdicts_are_those_of_a_rule_in_numpy(on_spike):
    config = LossSpikesConfig(on_nan="skip", on_spike=on_spike, spike_factor=4.0, norm_factor=3.0, window=7)
    chance = np.random.default_rng(1)
    watch, judged = LossHistory.new(config.window), jax.jit(lambda *arguments: check_step(config, *arguments))
    losses, norms, counts = [], [], dict.fromkeys(Counts._fields, 0)
    for step in range(1, 61):
        loss, norm = np.exp(0.2 * chance.normal(size=2)).astype(np.float32)
        event = chance.integers(8) if step > 5 else 0
        loss, norm = (loss * 5 if event == 1 else loss), (norm * 9 if event == 2 else norm)
        loss = np.float32(NAN) if event == 3 else loss
        loss_limit, norm_limit, spike = verdict_by_hand(config, losses, norms, loss, norm)
        left_out = not np.isfinite([loss, norm]).all() or (spike and on_spike == "skip")
        if left_out:
            counts["strikes"] = (0 if step - counts["last"] > config.window else counts["strikes"]) + 1
            counts["last"] = step
        else:
            losses, norms = [*losses, loss], [*norms, norm]
        counts |= {"spikes": counts["spikes"] + spike, "left_out": counts["left_out"] + left_out}
        verdict, watch = judged(watch, jnp.asarray(step), jnp.asarray(loss), jnp.asarray(norm))
        assert (bool(verdict.spike), bool(verdict.left_out)) == (spike, left_out)
        np.testing.assert_allclose((verdict.loss_limit, verdict.norm_limit), (loss_limit, norm_limit), rtol=1e-5)
        assert {name: int(value) for name, value in verdict.counts._asdict().items()} == counts
    assert min(counts["spikes"], counts["left_out"]) > 5


def test_what_is_remembered_goes_through_json_exactly():
    watch = LossHistory.new(6)
    for step, loss in enumerate([1 / 3, 1e-30, 7.7], 1):
        _, watch = check_step(
            LossSpikesConfig(window=6), watch, jnp.asarray(step), jnp.float32(loss), jnp.float32(2 * loss)
        )
    jax.tree.map(np.testing.assert_array_equal, LossHistory.from_json(watch.to_json(), 6), watch)
    assert LossHistory.from_json(watch.to_json(), 4).losses.tolist() == [np.inf, *watch.losses[3:].tolist()]
    assert LossHistory.from_json(watch.to_json(), 2).norms.tolist() == watch.norms[4:].tolist()


def params_after(config, plan, numbers):
    """The oracle: the run's own step, on batches of these numbers alone."""
    with planted(plan) as prepare:
        run = prepare(config, resume=False)
        state = run.state
        for number in range(1, max(numbers) + 1):
            batch = next(run.batches)
            if number in numbers:
                state, _ = run.step(state, run.frozen, batch)
    return state.params


def assert_same(folder, params):
    jax.tree.map(np.testing.assert_array_equal, params_of(load_model(folder)[0]), params)


@pytest.mark.thorough
def test_bad_updates_are_left_out(tmp_path, tiny_run, capsys):
    plan = {5: NAN, 9: 50.0}
    watch = LossSpikesConfig(on_nan="skip", on_spike="skip", window=6)
    whole, broken, oracle = (tiny_run(tmp_path / name, loss_spikes=watch) for name in ("whole", "broken", "oracle"))
    with planted(plan):
        assert train(whole).status == 0
    said = capsys.readouterr().err
    assert "step 5: the loss became nan; its update is left out (trouble 1, 3 are borne)" in said
    assert "step 9: the loss jumped to" in said
    with planted(plan, killed_at(8)), pytest.raises(Killed):
        train(broken)
    with planted(plan):
        assert train(broken, resume=True).status == 0
    assert lines_of(tmp_path / "broken") == lines_of(tmp_path / "whole")
    last = next(line for line in reversed(read_metrics(tmp_path / "whole" / "metrics.jsonl")) if "loss" in line)
    assert (last["spikes"], last["left_out"], last["roll_backs"]) == (1, 2, 0)
    good = set(range(1, 13)) - {5, 9}
    expected = params_after(oracle, plan, good)
    assert_same(tmp_path / "whole", expected)
    assert_same(tmp_path / "broken", expected)


@pytest.mark.thorough
def test_a_run_rolls_back_past_the_data_that_led_to_trouble(tmp_path, tiny_run, capsys):
    plan = {2: NAN, 5: NAN, 9: 50.0}
    watch = LossSpikesConfig(on_nan="roll_back", on_spike="roll_back", window=6, margin=2)
    whole, broken, oracle = (tiny_run(tmp_path / name, loss_spikes=watch) for name in ("whole", "broken", "oracle"))
    with planted(plan):
        assert train(whole).status == 0
    said = capsys.readouterr().err
    assert "step 2: the loss became nan; no checkpoint yet: its update is left out (trouble 1, 3 are borne)" in said
    assert f"step 5: the loss became nan; rolled back to {tmp_path}/whole/checkpoints/4: the updates of" in said
    # The checkpoint of step 8 is too close to the trouble to be trusted.
    assert f"rolled back to {tmp_path}/whole/checkpoints/5: the updates of batches 6 to 9 are undone" in said
    for number, step in ((8, 5), (11, 9)):
        with planted(plan, killed_at(number)), pytest.raises(Killed):
            train(broken, resume=number > 8)
        assert saved_steps(tmp_path / "broken")[-1] == step
    with planted(plan):
        assert train(broken, resume=True).status == 0
    assert lines_of(tmp_path / "broken") == lines_of(tmp_path / "whole")
    lines = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    ranges = [(line["step"], line["undone_from"], line["undone_to"]) for line in lines if "undone_to" in line]
    assert ranges == [(5, 5, 5), (9, 6, 9)]
    last = next(line for line in reversed(lines) if "loss" in line)
    assert (last["spikes"], last["left_out"], last["roll_backs"]) == (1, 6, 2)
    expected = params_after(oracle, plan, {1, 3, 4, 10, 11, 12})
    assert_same(tmp_path / "whole", expected)
    assert_same(tmp_path / "broken", expected)


@pytest.mark.thorough
def test_patience_ends_in_one_line(tmp_path, tiny_run, capsys):
    watch = LossSpikesConfig(on_nan="roll_back", window=6, patience=2)
    with planted(dict.fromkeys(range(5, 13), NAN)), pytest.raises(SystemExit) as ended:
        exit_cleanly(lambda: train(tiny_run(tmp_path / "run", loss_spikes=watch)).status)
    assert ended.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    last = tmp_path / "run" / "checkpoints" / "6"
    assert len(said) == 1
    assert "the loss became nan at step 7, and training.loss_spikes.patience 2 is used up" in said[0]
    assert f"the last good checkpoint is {last}; " in said[0]


@pytest.mark.thorough
def test_a_spike_is_said_even_when_it_is_ignored(tmp_path, tiny_run, capsys):
    watch = LossSpikesConfig(window=6)
    with planted({7: 50.0, 8: 50.0}):
        assert train(tiny_run(tmp_path / "run", loss_spikes=watch, steps=9)).status == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "the loss jumped to" in line]
    assert len(said) == 1
    assert said[0].startswith("step 7: ")
    last = next(line for line in reversed(read_metrics(tmp_path / "run" / "metrics.jsonl")) if "loss" in line)
    assert (last["spikes"], last["left_out"]) == (2, 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"on_nan": "pray"}, "training.loss_spikes.on_nan is 'pray'; choose one of stop, skip, roll_back"),
        ({"on_spike": "stop"}, "training.loss_spikes.on_spike is 'stop'; choose one of ignore, skip, roll_back"),
        ({"window": 3}, "training.loss_spikes.window is 3; give 4 or more"),
        ({"patience": -1}, "training.loss_spikes.patience is -1"),
        ({"spike_factor": 0.0}, "training.loss_spikes.spike_factor is 0.0; give a positive number"),
    ],
)
def test_wrong_options_are_named(wrong, message):
    with pytest.raises(UserError, match=message):
        LossSpikesConfig(**wrong)


def test_a_time_that_is_none():
    with pytest.raises(UserError, match=r"training\.monitoring\.hang_seconds is -1\.0"):
        MonitoringConfig(hang_seconds=-1.0)


def test_the_loss_is_watched(tmp_path, tiny_run):
    folder = tmp_path / "run"
    # An absurd learning rate without clipping overflows within a few steps, after the first checkpoint.
    optimizer = OptimizerConfig(learning_rate=1e30, warmup_steps=0, max_grad_norm=None)
    with pytest.raises(UserError) as stopped:
        train(tiny_run(folder, optimizer=optimizer, checkpoint_every=1, steps=50))
    message = str(stopped.value)
    step = int(message.split("at step ")[1].split(";")[0])
    assert f"the last good checkpoint is {(folder / 'checkpoints').absolute()}/{step - 1}" in message
    assert "--resume" in message
    assert "\n" not in message
    assert saved_steps(folder)[-1] == step - 1
