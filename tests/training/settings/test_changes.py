"""Settings that a run is resumed with: each difference is said, and the folder tells the truth."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lin_jax.training import OptimizerConfig, load_run_config
from lin_jax.training.config import CONFIG_FILE
from lin_jax.training.optimizer import learning_rate
from lin_jax.training.run import train
from lin_jax.training.settings.changes import changes, changes_of_finished


def test_every_difference_has_a_line(tmp_path: Path, tiny_run: Any) -> None:
    before = tiny_run(tmp_path, steps=30)
    before.save(tmp_path / CONFIG_FILE)
    assert changes(tmp_path, before, 10) == []
    # Another way to the same folder, or a folder that was moved, is no change.
    assert changes(tmp_path, replace(before, output="elsewhere"), 10) == []
    optimizer = replace(before.optimizer, learning_rate=0.5, max_grad_norm=None)
    now = replace(before, optimizer=optimizer, training=replace(before.training, steps=40, batch_size=8))
    rates = [float(learning_rate(run.optimizer, run.training.steps, 10)) for run in (before, now)]
    assert changes(tmp_path, now, 10) == [
        "optimizer.learning_rate is 0.5 from step 10 on; it was 0.01",
        "optimizer.max_grad_norm is null from step 10 on; it was 1.0",
        "training.steps is 40 from step 10 on; it was 30",
        "training.batch_size is 8 from step 10 on; it was 4",
        f"the learning rate of the next step is {rates[1]:.3g}; it was to be {rates[0]:.3g}",
    ]
    assert changes(tmp_path, replace(before, data=replace(before.data, validation_batches=1)), 10) == [
        "data.validation_batches is 1 from step 10 on; it was 2"
    ]


def test_a_finished_run_says_what_it_was_made_with(tmp_path: Path, tiny_run: Any) -> None:
    """Without what it filled in itself, or what alters nothing that it has learnt."""
    asked = tiny_run(tmp_path, steps=30)
    filled = replace(asked, model=replace(asked.model, vocab_size=280), init_from="/moved/teacher")
    filled.save(tmp_path / CONFIG_FILE)
    asked = replace(asked, init_from=str(tmp_path / "teacher"))
    assert changes_of_finished(tmp_path, asked) == []
    quiet = replace(asked.training, log_every=3, keep_checkpoints=9, plot=True)
    assert changes_of_finished(tmp_path, replace(asked, output="elsewhere", training=quiet)) == []
    other = replace(
        asked,
        data=replace(asked.data, source="other.txt"),
        model=replace(asked.model, attention="softmax"),
        training=replace(asked.training, batch_size=8),
    )
    lines = changes_of_finished(tmp_path, other)
    assert f"{tmp_path} is finished and stays as it is, with model.attention.name augmented, not softmax" in lines[0]
    assert any("with data.source" in line and "not other.txt; give another output" in line for line in lines)
    assert lines[-1].endswith("with training.batch_size 4, not 8; give another output to train anew")
    (tmp_path / CONFIG_FILE).write_text("sheep: 3\n")
    assert len(changes_of_finished(tmp_path, asked)) == 1


@pytest.mark.parametrize("content", [None, "sheep: 3\n"])
def test_a_folder_without_settings(content: str | None, tmp_path: Path, tiny_run: Any) -> None:
    if content is not None:
        (tmp_path / CONFIG_FILE).write_text(content)
    (line,) = changes(tmp_path, tiny_run(tmp_path), 10)
    assert line.endswith("written anew")


@pytest.mark.thorough
def test_a_resumed_run_says_them_and_writes_them_down(
    tmp_path: Path, tiny_run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny_run(tmp_path, steps=2))
    written = (tmp_path / CONFIG_FILE).read_bytes()
    capsys.readouterr()
    train(tiny_run(tmp_path, steps=2), resume=True)
    assert " from step 2 on" not in capsys.readouterr().err
    assert (tmp_path / CONFIG_FILE).read_bytes() == written
    train(tiny_run(tmp_path, steps=3, batch_size=8, optimizer=OptimizerConfig(learning_rate=0.02)), resume=True)
    said = capsys.readouterr().err
    for line in ("training.steps is 3", "training.batch_size is 8", "optimizer.learning_rate is 0.02"):
        assert f"{line} from step 2 on; it was" in said
    config = load_run_config(tmp_path)
    assert (config.training.steps, config.training.batch_size, config.optimizer.learning_rate) == (3, 8, 0.02)
    assert sorted(path.name for path in tmp_path.glob("*config*")) == [CONFIG_FILE]
