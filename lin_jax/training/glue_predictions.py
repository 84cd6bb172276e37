"""What a run says of its task's test set, as GLUE's server takes it: `python -m lin_jax.training.glue_predictions RUN`.

Writes `RUN/SST-2.tsv` and the like: a line for each text in its order, `index<TAB>prediction`, classes by their names.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lin_jax.data import Tokenizer
from lin_jax.data.glue import Task, glue_task
from lin_jax.data.glue_files import Example, read_examples
from lin_jax.data.task_batches import Reader, Rows, row_length, task_validation_batches
from lin_jax.errors import OptionParser, UserError, exit_cleanly
from lin_jax.training.inputs import task_reader
from lin_jax.training.loading import load_model
from lin_jax.training.setup import TOKENIZER_FOLDER

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
    model, config, _ = load_model(run, step)
    if config.data.task is None:
        raise UserError(f"{run} has no task; give the folder of a run with objective classification")
    task = glue_task(config.data.task)
    reader = task_reader(config, task, Tokenizer.load(run / TOKENIZER_FOLDER))
    paths = []
    for part in task.tests:
        examples = read_examples(source or config.data.sources[0], task, part)
        ending = "" if len(task.tests) == 1 else _MISMATCHED if part.name else _MATCHED
        paths.append(run / f"{task.folder}{ending}.tsv")
        scores = _scores(model, reader, examples, config.data.sequence_length, config.training.batch_size)
        lines = [f"{number}\t{text}\n" for number, text in enumerate(_said(scores, task))]
        paths[-1].write_text("".join(["index\tprediction\n", *lines]))
    return paths


def _scores(model: Any, reader: Reader, examples: Sequence[Example], length: int, batch_size: int) -> np.ndarray:
    """What a model says of every example, `[N, C]`."""
    segments = reader.segments(examples, length)
    rows = Rows(reader, examples, segments, row_length([segments], length))
    say = jax.jit(lambda model, inputs: model(**inputs))
    scores = []
    for batch in task_validation_batches([rows], batch_size=batch_size):
        inputs = {name: batch[name] for name in ("tokens", "mask", "types") if name in batch}
        scores.append(np.asarray(say(model, inputs))[batch["part"] >= 0])
    return np.concatenate(scores)


def _said(scores: np.ndarray, task: Task) -> Iterator[str]:
    if task.is_regression:
        # The scale of its labels.
        return (f"{score:.3f}" for score in np.clip(scores[:, 0], 0, 5))
    return (task.labels[best] for best in np.argmax(scores, axis=-1))


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = OptionParser(
        prog="python -m lin_jax.training.glue_predictions",
        description="Writes what a run says of its task's test set, as GLUE's server takes it.",
    )
    parser.add_argument("run", help="folder of a run with objective classification")
    parser.add_argument("--source", help="folder of GLUE's files, or hub:nyu-mll/glue; by default the run's own")
    parser.add_argument("--step", type=int, help="step of the checkpoint; by default the newest")
    options = parser.parse_args()
    for path in write_predictions(options.run, source=options.source, step=options.step):
        print(path)
    return 0


if __name__ == "__main__":
    exit_cleanly(main)
