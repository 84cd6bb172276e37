"""Stages in one file: read and refused, run and gone on with, and compared."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
import yaml
from support.interrupted import lines_of, stopping_after

from lin_jax.errors import UserError
from lin_jax.models.params import params_of
from lin_jax.training import load_model, load_run_config
from lin_jax.training.stages.config import Pipeline, completed, parse_command
from lin_jax.training.stages.run import run_stages

STAGES = [
    {"name": "teacher", "model": {"attention": {"name": "softmax"}}},
    {"name": "transfer", "objective": "attention_transfer", "transfer": {"blocks": 2, "progressive": True}},
    {"name": "tune", "adapters": {"rank": 2}, "distillation": {"weight": 0.5}, "training": {"steps": 6}},
]


@pytest.fixture
def written(tmp_path, corpus):
    """Writes a file of stages; its path."""

    def write(stages=STAGES, **fields):
        content = {
            "output": str(tmp_path / "out"),
            "model": {
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_layers": 2,
                "num_heads": 2,
                "attention": {"group_size": 8, "kernel_size": 7},
            },
            "data": {
                "source": str(corpus),
                "document_separator": "<|endoftext|>",
                "vocab_size": 280,
                "sequence_length": 24,
                "validation_batches": 2,
            },
            "optimizer": {"warmup_steps": 2},
            "training": {"steps": 2, "batch_size": 4, "evaluate_every": 6, "log_every": 1, "plot": False},
            "stages": stages,
            **fields,
        }
        path = tmp_path / "stages.yaml"
        path.write_text(yaml.safe_dump(content))
        return str(path)

    return write


def test_what_a_file_says(written, tmp_path):
    """Stages take the file's fields, their own, options for all and options for one, in this order."""
    pipeline, resume, _ = parse_command(
        [written(), "--resume", "--training.batch_size=8", "--stages.tune.training.steps", "5", "--training.seed", "3"]
    )
    assert isinstance(pipeline, Pipeline)
    assert resume
    assert {len(stage.runs) for stage in pipeline.stages} == {1}
    pipeline = completed(pipeline)
    teacher, transfer, tune = pipeline.stages
    assert [stage.name for stage in pipeline.stages] == ["teacher", "transfer", "tune"]
    first, second = transfer.runs
    out = tmp_path / "out"
    assert [teacher.last.output, first.output, second.output, tune.last.output] == [
        str(out / name) for name in ("teacher", "transfer/block_1", "transfer", "tune")
    ]
    assert [teacher.last.init_from, first.init_from, second.init_from, tune.last.init_from] == [
        None,
        teacher.last.output,
        first.output,
        second.output,
    ]
    assert (first.transfer.layers, second.transfer.layers, second.transfer.progressive) == ((0, 1), (1, 2), True)
    assert (first.training.steps, second.training.steps, tune.last.training.steps) == (1, 1, 5)
    assert {run.training.batch_size for stage in pipeline.stages for run in stage.runs} == {8}
    assert {run.training.seed for stage in pipeline.stages for run in stage.runs} == {3}
    assert (teacher.last.model.attention.name, tune.last.model.attention.name) == ("softmax", "augmented")
    assert tune.last.model.attention.group_size == 8


@pytest.mark.parametrize(
    ("stages", "options", "message"),
    [
        ([], [], "stages is no list of stages"),
        ([{"objective": "language_model"}], [], "stage 1 has the name None; give it one of letters"),
        ([{"name": "a/b"}], [], "stage 1 has the name 'a/b'; give it one of letters"),
        ([{"name": "a"}, {"name": "a"}], [], "two stages have the name 'a'"),
        ([{"name": "a", "output": "x"}], [], "stage 'a' has the field output, which is for the whole file"),
        ([{"name": "a", "objectiv": "x"}], [], "stage 'a': .*objectiv"),
        ([{"name": "a"}, {"name": "b", "training": {"steps": 0}}], [], "stage 'b': training.steps is 0"),
        ([{"name": "a", "adapters": {"rank": 2}}], [], "stage 'a': adapters need init_from"),
        ([{"name": "a", "init_from": "nowhere"}], [], "stage 'a': init_from nowhere does not exist"),
        (
            [{"name": "a"}, {"name": "b", "adapters": {"target_modules": ["querry"]}}],
            [],
            "stage 'b': adapters.target_modules names 'querry'",
        ),
        (
            [{"name": "a"}, {"name": "b", "objective": "attention_transfer", "transfer": {"blocks": 3}}],
            [],
            "stage 'b': transfer.blocks is 3, and the model has 2 layers",
        ),
        (
            [{"name": "a"}, {"name": "b", "objective": "medusa"}, {"name": "c"}],
            [],
            "stage 'c': it begins from .*b, which will hold heads and no model",
        ),
        (STAGES, ["--stages.tun.training.steps", "3"], "--stages.tun.training.steps is for no stage; the stages are"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_done(written, tmp_path, stages, options, message):
    def begin():
        run_stages(parse_command([written(stages), *options])[0])

    with pytest.raises(UserError, match=message) as caught:
        begin()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.thorough
def test_stages_that_are_stopped_go_on_exactly(written, tmp_path, monkeypatch, capsys, caplog):
    whole, *_ = parse_command([written(held_out={"validation_fraction": 0.3})])
    assert run_stages(whole) == 0
    table = capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["name"] for row in rows] == ["teacher", "augmented, untrained", "transfer", "tune"]
    assert [row["steps"] for row in rows] == [2, 0, 2, 6]
    assert all(f"{row['perplexity']:.3f}" in table for row in rows)
    assert (tmp_path / "out" / "report.md").read_text().startswith(table.strip())
    assert (tmp_path / "out" / "report.png").stat().st_size > 1000
    with pytest.raises(UserError, match="already holds the stage teacher; add --resume"):
        run_stages(whole)

    # The same but for the last stage, which is stopped halfway; those before it are left as they are.
    copy = shutil.copytree(tmp_path / "out", tmp_path / "copy")
    shutil.rmtree(copy / "tune")
    (copy / "report.json").write_text(json.dumps(rows[:3]))
    broken, *_ = parse_command([written(held_out={"validation_fraction": 0.3}), "--output", str(copy)])
    times = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}
    with stopping_after(3, monkeypatch):
        assert run_stages(broken, resume=True) == 143
    assert run_stages(broken, resume=True) == 0
    assert lines_of(copy / "tune") == lines_of(tmp_path / "out" / "tune")
    ours, theirs = (params_of(load_model(folder / "tune")[0]) for folder in (copy, tmp_path / "out"))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    again = json.loads((copy / "report.json").read_text())
    timeless = [[{**row, "seconds": 0} for row in each] for each in (again, rows)]
    assert timeless[0] == timeless[1]
    unchanged = [path for path, time in times.items() if "teacher" in path.parts or "transfer" in path.parts]
    assert all(path.stat().st_mtime_ns == times[path] for path in unchanged)

    # Asked for otherwise, stages that are finished say what they were made with; a moved folder is no difference.
    assert "is finished" not in caplog.text
    other, *_ = parse_command(
        [written(held_out={"validation_fraction": 0.3}), "--output", str(copy), "--stages.teacher.optimizer.eps", "0.1"]
    )
    assert run_stages(other, resume=True) == 0
    (line,) = [line for line in caplog.messages if "is finished" in line]
    assert line.startswith(f"{copy / 'teacher'} is finished and stays as it is, with optimizer.eps 1e-08, not 0.1")


@pytest.mark.thorough
def test_a_teacher_must_have_the_same_vocabulary(written, tmp_path, base_run, tiny_run):
    from lin_jax.training.initialization.base_and_teacher import teacher_source
    from lin_jax.training.model_source import ModelSource
    from lin_jax.training.run import train
    from lin_jax.training.setup import resolve

    own = tiny_run(tmp_path / "own", steps=1)
    train(replace(own, data=replace(own.data, vocab_size=270)))
    run = tiny_run(tmp_path / "run", objective="attention_transfer", init_from=str(base_run))
    with pytest.raises(UserError, match=r"no model behind init_from .*base has another attention than this run's"):
        resolve(run, resume=False)
    with pytest.raises(UserError, match=r"own has a vocabulary of 270, the model of 280; a teacher needs the same"):
        resolve(replace(run, teacher=str(tmp_path / "own")), resume=False)
    linear = replace(run, model=replace(run.model, attention=replace(run.model.attention, group_size=4)))
    assert teacher_source(linear, ModelSource.open(base_run)).place == base_run
    assert load_run_config(base_run).model.attention.group_size == 8
