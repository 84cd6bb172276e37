"""Runs the stages of a pipeline, and compares their models on held-out text."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from lin_jax.data import DataConfig, Tokenizer
from lin_jax.errors import UserError
from lin_jax.evaluation.perplexity import evaluate
from lin_jax.evaluation.targets import Batch
from lin_jax.training.checkpoint_files import saved_steps
from lin_jax.training.config import RunConfig
from lin_jax.training.inputs import held_out_batches
from lin_jax.training.loading import base_types, load_any, load_model
from lin_jax.training.loop import train
from lin_jax.training.objectives import OBJECTIVES, LanguageModel, initial_key
from lin_jax.training.pipeline import Pipeline, Stage, completed
from lin_jax.training.stage_report import REPORT_FILE, Row, StageReport
from lin_jax.training.teacher import TOKENIZER_FOLDER
from lin_jax.training.tracker import METRICS_FILE, read_metrics


def run_stages(pipeline: Pipeline, *, resume: bool = False) -> int:
    """Runs every stage to its end, or until Ctrl-C or SIGTERM, and writes `report.json`, `report.md`, `report.png`.

    Args:
        pipeline: the stages.
        resume: go on in the stage that was interrupted, exactly; those that are finished are left alone.

    Returns:
        Exit status of a script.

    Raises:
        UserError: a stage cannot be run, which is found out before the first begins, or something is in its place.
    """
    pipeline = completed(pipeline)
    report = StageReport.open(pipeline.output / REPORT_FILE)
    _check_places(pipeline, report, resume)
    for number, stage in enumerate(pipeline.stages):
        if report.holds(stage.name, stage.last.training.steps):
            continue
        for run in stage.runs:
            if (saved_steps(Path(run.output)) or [0])[-1] >= run.training.steps and run is not stage.last:
                continue
            outcome = train(run, resume=bool(saved_steps(Path(run.output))))
            if outcome.status:
                return outcome.status
        report.add(stage.name, _measured(stage, pipeline.held_out, first=number == 0))
    report.finish()
    print(report.table())
    return 0


def _check_places(pipeline: Pipeline, report: StageReport, resume: bool) -> None:
    there = [run.output for stage in pipeline.stages for run in stage.runs if saved_steps(Path(run.output))]
    if (there or report.rows) and not resume:
        raise UserError(
            f"{pipeline.output} already holds the stage {Path(there[0]).name if there else report.rows[0].stage}; "
            "add --resume to go on from there, or give another --output"
        )
    if resume and not there:
        raise UserError(f"there is no stage in {pipeline.output} to go on with; leave --resume out to start")


def _measured(stage: Stage, text: DataConfig, *, first: bool) -> list[Row]:
    """The stage's rows: what it began with, if that is not the stage before, and what it ended with.

    What it began with are the model of `init_from` (before the first stage), and its weights under another attention,
    where the stage gives it one.
    """
    run, begin = stage.last, stage.runs[0]
    if not OBJECTIVES[run.objective].has_model:
        return [Row(stage.name, stage.name, run.objective, run.training.steps, _seconds(stage))]
    tokenizer = Tokenizer.load(Path(run.output) / TOKENIZER_FOLDER)
    batches = held_out_batches(replace(run, data=text), tokenizer)
    rows = []
    if begin.init_from is not None:
        base, _ = load_any(begin.init_from, types=base_types(begin))
        own: Any = replace(begin.model, vocab_size=base.config.vocab_size)
        if first:
            rows.append(_row(stage, "teacher", "as it is given", base, batches))
        if own.attention != base.config.attention:
            start = LanguageModel(own)
            model = start.parts(start.start(initial_key(begin.training.seed), base), {})[0]
            rows.append(_row(stage, f"{own.attention.name}, untrained", "before any training", model, batches))
    model, _, _ = load_model(run.output)
    steps = sum(each.training.steps for each in stage.runs)
    return [*rows, _row(stage, stage.name, described(run), model, batches, steps, _seconds(stage))]


def _row(
    stage: Stage,
    name: str,
    what: str,
    model: Any,
    batches: list[Batch],
    steps: int = 0,
    seconds: float = 0.0,
) -> Row:
    found = evaluate(model, batches)
    return Row(stage.name, name, what, steps, seconds, found.loss, found.perplexity, found.tokens)


def _seconds(stage: Stage) -> float:
    """Training time of all its runs."""
    lines = [read_metrics(Path(run.output) / METRICS_FILE) for run in stage.runs]
    return sum(max((line.get("seconds", 0.0) for line in each), default=0.0) for each in lines)


def described(run: RunConfig) -> str:
    """What a run learns, in a few words."""
    words = [run.objective.replace("_", " ")]
    if run.adapters is not None:
        words.append(f"adapters of rank {run.adapters.rank}")
    if run.distillation.weight:
        words.append("distillation")
    return ", ".join(words)
