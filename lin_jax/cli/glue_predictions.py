"""Command `glue-predictions`: a run's predictions for its task's test set, as GLUE's server takes them.

Writes `RUN/SST-2.tsv` and the like: a line for each text in its order, `index<TAB>prediction`, classes by their names.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lin_jax.data.glue.batches import ExampleEncoder, ExampleRows, row_length, task_validation_batches
from lin_jax.data.glue.files import Example, read_examples
from lin_jax.data.glue.tasks import Task, glue_task
from lin_jax.devices import device_kind
from lin_jax.errors import OptionParser, UserError
from lin_jax.training.inputs import task_encoder
from lin_jax.training.model_source import ModelSource

# GLUE's server tells the two sets of MNLI apart by these endings.
_MATCHED, _MISMATCHED = "-m", "-mm"


def write_predictions(run: str | Path, *, source: str | None = None, step: int | None = None) -> list[Path]:
    """Writes a file for each of a task's test sets to a run's folder; returns their paths.

    Args:
        run: the folder.
        source: where the test sets are; None takes what the run learnt from.
        step: of the checkpoint; None takes the newest.

    Raises:
        UserError: the run is none of classification, or a test set is not there.
    """
    run = Path(run)
    device_kind()
    opened = ModelSource(run, step)
    model, config = opened.model(), opened.run
    if config.data.task is None:
        raise UserError(f"{run} has no task; give the folder of a run with objective classification")
    task = glue_task(config.data.task)
    encoder = task_encoder(config, task, opened.tokenizer())
    paths = []
    for split in task.tests:
        examples = read_examples(source or config.data.sources[0], task, split)
        ending = "" if len(task.tests) == 1 else _MISMATCHED if split.name else _MATCHED
        paths.append(run / f"{task.folder}{ending}.tsv")
        scores = example_scores(model, encoder, examples, config.data.sequence_length, config.training.batch_size)
        lines = [f"{number}\t{text}\n" for number, text in enumerate(_said(scores, task))]
        paths[-1].write_text("".join(["index\tprediction\n", *lines]))
    return paths


def example_scores(
    model: Any, encoder: ExampleEncoder, examples: Sequence[Example], length: int, batch_size: int
) -> np.ndarray:
    """Scores every example, `[N, C]`."""
    segments = encoder.segments(examples, length)
    rows = ExampleRows(encoder, examples, segments, row_length([segments], length))
    say = jax.jit(lambda model, inputs: model(**inputs))
    scores = []
    for batch in task_validation_batches([rows], batch_size=batch_size):
        inputs = {name: batch[name] for name in ("tokens", "mask", "types") if name in batch}
        scores.append(np.asarray(say(model, inputs))[batch["split"] >= 0])
    return np.concatenate(scores)


def _said(scores: np.ndarray, task: Task) -> Iterator[str]:
    if task.is_regression:
        # The scale of its labels.
        return (f"{score:.3f}" for score in np.clip(scores[:, 0], 0, 5))
    return (task.labels[best] for best in np.argmax(scores, axis=-1))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status.

    Args:
        argv: the command line; None takes the process's own.
    """
    parser = OptionParser(
        prog="python -m lin_jax glue-predictions",
        description="Writes a run's predictions for its task's test set, as GLUE's server takes them.",
    )
    parser.add_argument("run", help="folder of a run with objective classification")
    parser.add_argument("--source", help="folder of GLUE's files, or hub:nyu-mll/glue; by default the run's own")
    parser.add_argument("--step", type=int, help="step of the checkpoint; by default the newest")
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    for path in write_predictions(options.run, source=options.source, step=options.step):
        print(path)
    return 0
