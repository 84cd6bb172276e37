"""How often a run opens the checkpoints that it starts from."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from support.cells import cells

from lin_jax.cli.hub.options import main
from lin_jax.hub.load import HubCheckpoint
from lin_jax.training import load_model
from lin_jax.training.model_source import read_run_params
from lin_jax.training.run import train


@pytest.fixture
def opened(monkeypatch):
    """Counts by folder how often Hugging Face folders are opened, and parameters of runs read."""
    counts = Counter()
    open_folder = HubCheckpoint.open.__func__

    def counted(cls, place):
        counts[Path(place)] += 1
        return open_folder(cls, place)

    def read(run, *arguments):
        counts[Path(run)] += 1
        return read_run_params(run, *arguments)

    monkeypatch.setattr(HubCheckpoint, "open", classmethod(counted))
    monkeypatch.setattr("lin_jax.training.model_source.read_run_params", read)
    return counts


@pytest.mark.parametrize("kind", cells(["folders"], ["runs"]))
def test_base_and_teacher_are_opened_once(kind, base_run, tiny_run, tmp_path, opened):
    base, teacher = Path(base_run), tmp_path / "teacher"
    softmax = replace(load_model(base_run)[0].config, attention="softmax")
    train(tiny_run(teacher, model=softmax, init_from=str(base_run), steps=1))
    if kind == "folders":
        for place, out in ((base_run, "base"), (teacher, "softmax")):
            assert main(["export", str(place), str(tmp_path / out)]) == 0
        base, teacher = tmp_path / "base", tmp_path / "softmax"
    opened.clear()
    run = tiny_run(tmp_path / "run", objective="attention_transfer", init_from=str(base), steps=1)
    train(replace(run, teacher=str(teacher)))
    assert opened == {base: 1, teacher: 1}


@pytest.mark.thorough
def test_a_base_that_is_the_teacher_is_opened_once(base_run, tiny_run, tmp_path, opened):
    assert main(["export", str(base_run), str(tmp_path / "base")]) == 0
    opened.clear()
    run = tiny_run(tmp_path / "run", objective="attention_transfer", init_from=str(tmp_path / "base"), steps=1)
    train(replace(run, model=replace(run.model, attention="relu+local")))
    assert opened == {tmp_path / "base": 1}
