"""Quality of the demo's students: perplexity of held-out text beside the teacher's, and beside a window alone."""

from dataclasses import replace
from typing import Any

from lin_jax.data import Tokenizer
from lin_jax.demo.progress import PartProgress
from lin_jax.demo.runs import BEST, STUDENTS, DemoRuns
from lin_jax.report.figures import BASELINE, STUDENT, TEACHER, ModelFigures
from lin_jax.report.measure import Candidate, Trial, baselines, measure, window_of
from lin_jax.session import check_causal
from lin_jax.training.inputs import held_out_batches
from lin_jax.training.model_source import ModelSource


def measure_quality(runs: DemoRuns) -> dict[str, Any]:
    """Measures the perplexity of teacher, students, and of the teacher with a window as long as the best student's.

    All read the same rows of held-out text, as long as those in training, which nothing was trained on.

    Args:
        runs: finished ones, but for the head's.

    Returns:
        `teacher` and, by name, `students` and `baselines`: perplexity, ratio to the teacher's with the interval of 95%
        of a bootstrap over rows, and bytes of state after one row; `tokens`, `rows` and `row_length` of the text.

    Raises:
        UserError: a model is not there, or the text does not go with it.
    """
    source = runs.source
    tokenizer = source.tokenizer(runs.tokenizer)
    teacher = _candidate("teacher", source, TEACHER, tokenizer)
    others = [_candidate(name, ModelSource(runs.student_folder(name)), STUDENT, tokenizer) for name in STUDENTS]
    window = window_of(others[STUDENTS.index(BEST)].model.config.attention)
    windowed, _ = baselines(teacher, [] if window is None else [window])
    batches = held_out_batches(replace(runs.student_runs(BEST)[-1], data=runs.data), tokenizer)
    trial = Trial(
        text=runs.data.name,
        batches=batches,
        prompts=[],
        training_length=runs.data.sequence_length,
        rounds=0,
        ablate=False,
    )
    everyone = [teacher, *windowed, *others]
    with PartProgress(len(everyone), "model") as progress:
        report = measure(teacher, [*windowed, *others], trial, progress.step)
    first, *rest = report.models
    return {
        "teacher": _figures(first),
        "students": {each.name: _figures(each) for each in rest if each.kind == STUDENT},
        "baselines": {each.name: _figures(each) for each in rest if each.kind == BASELINE},
        "tokens": report.tokens,
        "rows": report.rows,
        "row_length": report.row_length,
    }


def _candidate(name: str, source: ModelSource, kind: str, tokenizer: Tokenizer) -> Candidate:
    model = source.model()
    check_causal(model, str(source.place))
    return Candidate(name, str(source.place), kind, model, tokenizer, ())


def _figures(model: ModelFigures) -> dict[str, Any]:
    return {
        "perplexity": model.perplexity,
        "ratio": model.ratio.value,
        "interval": [model.ratio.low, model.ratio.high],
        "attention": model.attention,
        "state_bytes": model.state_bytes,
        "state_grows": model.state_grows,
    }
