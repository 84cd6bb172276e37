"""Examples of a GLUE task, read from a folder with GLUE's own files or from the Hub.

The files are split at tabs and line ends alone: quotes are text, and some of them are never closed.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lin_jax.data.glue.tasks import Task, TaskSplit
from lin_jax.data.sources.files import PACKED, UNREADABLE, read_text
from lin_jax.data.sources.remote import HUB_PREFIX, asking_the_hub
from lin_jax.data.sources.tables import readable
from lin_jax.errors import UserError
from lin_jax.extras import require

log = logging.getLogger(__name__)

_ENDINGS = ("", *PACKED)


class Example(NamedTuple):
    """A text, or a pair of texts, with its label.

    Attributes:
        sentences: one or two.
        label: number of the class; in a regression task, the number to predict.
    """

    sentences: tuple[str, ...]
    label: float


def read_examples(source: str, task: Task, split: TaskSplit) -> list[Example]:
    """Reads the examples of one split of a task.

    Args:
        source: a folder that holds the task's folder, or that folder itself, or `hub:OWNER/NAME`.
        task: the task.
        split: `TRAIN`, or one of `task.held_out` or `task.tests`; labels of the last are zeros.

    Raises:
        UserError: the split does not exist, cannot be read, has no examples, lacks a column, or has an unknown label.
    """
    on_hub = source.startswith(HUB_PREFIX)
    examples = list(_from_hub(source, task, split) if on_hub else _from_file(_find(source, task, split), task, split))
    if not examples:
        raise UserError(
            f"{source} holds no examples of {task.name} in {split.hub if on_hub else split.file}; give another "
            "data.source"
        )
    return examples


def _find(source: str, task: Task, split: TaskSplit) -> Path:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise UserError(f"data.source {source!r} is not a folder; give one with GLUE's files, or hub:nyu-mll/glue")
    for parent in (folder / task.folder, folder):
        for ending in _ENDINGS:
            if (parent / (split.file + ending)).is_file():
                return parent / (split.file + ending)
    raise UserError(
        f"there is no {task.folder}/{split.file} (or {', '.join(PACKED)}) in {source}; download GLUE's files for "
        f"{task.name}, or give data.source hub:nyu-mll/glue"
    )


def _from_file(path: Path, task: Task, split: TaskSplit) -> Iterator[Example]:
    try:
        text = read_text(path)
    except UNREADABLE as error:
        raise UserError(f"{path} is not readable as UTF-8 text: {error}; download the file again") from error
    # Not splitlines(): sentences hold characters that it takes for the end of a line.
    rows = [line.removesuffix("\r").split("\t") for line in text.split("\n") if line.strip()]
    columns, first = _column_indices(path, task, split, rows[0] if rows else [])
    short = 0
    for number, row in enumerate(rows[first:], first + 1):
        if len(row) <= max(columns):
            short += 1
            continue
        sentences = tuple(row[column] for column in columns[: len(task.sentences)])
        where = f"{path}, line {number}"
        yield Example(sentences, _label(row[columns[-1]], task, where) if split.labelled else 0)
    if short:
        log.warning("%s: left out %d lines with too few columns", path, short)


def _column_indices(path: Path, task: Task, split: TaskSplit, first: list[str]) -> tuple[list[int], int]:
    """Indices of the columns of sentences and label, and the index of the first line that is an example."""
    columns = [*task.sentences, task.label] if split.labelled else [*task.sentences]
    if all(column.header in first for column in columns):
        return [first.index(column.header) for column in columns], 1
    # A first line that is an example already has a label where labels stand.
    indices = [column.index if column.index >= 0 else len(first) - 1 for column in columns]
    fits = split.labelled and max(indices) < len(first)
    if fits and (not task.header or _is_label(first[indices[-1]], task)):
        return indices, 0
    missing = next(column.header for column in columns if column.header not in first)
    raise UserError(
        f"{path} has no column {missing!r} in its first line, as {task.folder} has; download the file again"
    )


def _is_label(text: str, task: Task) -> bool:
    return _is_number(text) if task.is_regression else text in task.labels


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _label(text: str, task: Task, where: str) -> float:
    if not _is_label(text, task):
        known = "a number" if task.is_regression else f"one of {', '.join(task.labels)}"
        raise UserError(f"label {text!r} in {where} is not a label of {task.folder}; give {known}")
    return float(text) if task.is_regression else task.labels.index(text)


def _from_hub(source: str, task: Task, split: TaskSplit) -> Iterator[Example]:
    load_dataset = require("datasets", "reading a data set of the Hub").load_dataset
    name = f"{source}, configuration {task.name}"
    with readable(name), asking_the_hub(name, f"GLUE's own files of it (the folder {task.folder})"):
        rows = load_dataset(source.removeprefix(HUB_PREFIX), task.name, split=split.hub)
    for number, row in enumerate(rows):
        yield _from_row(row, task, split, f"{source}, row {number} of {split.hub}")


def _from_row(row: Mapping[str, Any], task: Task, split: TaskSplit, where: str) -> Example:
    for column in (*task.sentences, task.label):
        if column.hub not in row:
            raise UserError(
                f"{where}, has no column {column.hub!r}; give a data set with it, this one has {', '.join(sorted(row))}"
            )
    label = float(row[task.label.hub]) if split.labelled else 0.0
    if not task.is_regression and label not in range(len(task.labels)):
        raise UserError(f"label {label:g} in {where} is not a label of {task.name}; give a split with labels")
    return Example(tuple(row[column.hub] for column in task.sentences), label)
