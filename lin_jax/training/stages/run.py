"""Runs the stages of a pipeline, and compares their models on held-out text."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lin_jax.data import Corpus, DataConfig, load_tokenizer
from lin_jax.data.sources.remote import given_by
from lin_jax.errors import UserError
from lin_jax.evaluation.perplexity import evaluate
from lin_jax.losses.cross_entropy import Batch
from lin_jax.training.checkpoint.files import saved_steps
from lin_jax.training.config import RunConfig
from lin_jax.training.inputs import held_out_batches
from lin_jax.training.model_source import TOKENIZER_FOLDER, ModelSource, load_model, with_attention
from lin_jax.training.monitoring.trackers import METRICS_FILE, read_metrics
from lin_jax.training.objectives.registry import kind_of
from lin_jax.training.run import train
from lin_jax.training.settings.changes import changes_of_finished
from lin_jax.training.stages.config import Pipeline, Stage, completed
from lin_jax.training.stages.report import REPORT_FILE, StageReport, StageResult

log = logging.getLogger(__name__)


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
    if pipeline.held_out.is_remote:
        # Fetched now, not found missing after the first stage.
        own = pipeline.held_out.parts != pipeline.stages[0].last.data.parts
        with given_by("--held_out.source" if own else "--data.source"):
            Corpus.open(pipeline.held_out)
    report = StageReport.open(pipeline.output / REPORT_FILE)
    _check_places(pipeline, report, resume)
    for number, stage in enumerate(pipeline.stages):
        if report.holds(stage.name, stage.last.training.steps):
            _say_changes(stage.runs)
            continue
        for run in stage.runs:
            if (saved_steps(Path(run.output)) or [0])[-1] >= run.training.steps and run is not stage.last:
                _say_changes([run])
                continue
            outcome = train(run, resume=bool(saved_steps(Path(run.output))))
            if outcome.status:
                return outcome.status
        report.add(stage.name, _measured(stage, pipeline.held_out, first=number == 0))
    report.finish()
    print(report.table())
    return 0


def _say_changes(runs: Sequence[RunConfig]) -> None:
    for run in runs:
        for line in changes_of_finished(Path(run.output), run):
            log.warning("%s", line)


def _check_places(pipeline: Pipeline, report: StageReport, resume: bool) -> None:
    there = [run.output for stage in pipeline.stages for run in stage.runs if saved_steps(Path(run.output))]
    if (there or report.rows) and not resume:
        raise UserError(
            f"{pipeline.output} already holds the stage {Path(there[0]).name if there else report.rows[0].stage}; "
            "add --resume to go on from there, or give another --output"
        )
    if resume and not there:
        raise UserError(f"there is no stage in {pipeline.output} to go on with; leave --resume out to start")


def _measured(stage: Stage, text: DataConfig, *, first: bool) -> list[StageResult]:
    """The stage's rows: what it began with, if that is not the stage before, and what it ended with.

    What it began with are the model of `init_from` (before the first stage), and its weights under another attention,
    where the stage gives it one.
    """
    run, begin = stage.last, stage.runs[0]
    if not kind_of(run).trains.has_model:
        return [StageResult(stage.name, stage.name, run.objective, run.training.steps, _seconds(stage))]
    tokenizer = load_tokenizer(Path(run.output) / TOKENIZER_FOLDER)
    batches = held_out_batches(replace(run, data=text), tokenizer)
    rows = []
    if begin.init_from is not None:
        base = ModelSource.open(begin.init_from).model(compute=begin.model.compute)
        own: Any = replace(begin.model, vocab_size=base.config.vocab_size)
        if first:
            rows.append(_row(stage, "teacher", "as it is given", base, batches))
        if own.attention.for_layers(own.num_layers) != base.config.attention:
            model = with_attention(base, own.attention, begin.training.seed)
            rows.append(_row(stage, f"{own.attention.label}, untrained", "before any training", model, batches))
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
) -> StageResult:
    found = evaluate(model, batches)
    return StageResult(stage.name, name, what, steps, seconds, found.loss, found.perplexity, found.tokens)


def _seconds(stage: Stage) -> float:
    """Training time of all its runs."""
    lines = [read_metrics(Path(run.output) / METRICS_FILE) for run in stage.runs]
    return sum(max((line.get("seconds", 0.0) for line in each), default=0.0) for each in lines)


def described(run: RunConfig) -> str:
    """Describes a run's objective in a few words."""
    words = [run.objective.replace("_", " ")]
    if run.adapters is not None:
        words.append(f"adapters of rank {run.adapters.rank}")
    if run.distillation.weight:
        words.append("distillation")
    return ", ".join(words)
