"""Rows of instruction data, a prompt and its completion or a conversation, as texts of JSON.

An example goes through shuffling, splitting and streaming as a text like any other; what of it is a target is decided
when it is tokenized.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lin_jax.data.config import MESSAGES, PROMPT_COMPLETION
from lin_jax.data.sources.files import suffix_inside
from lin_jax.data.sources.rows import SEPARATORS, EmptyTableError, json_rows, readable_table, separated_cells
from lin_jax.errors import UserError

# Columns of each format.
COLUMNS = {PROMPT_COMPLETION: ("prompt", "completion"), MESSAGES: ("messages",)}


def read_examples(path: str, format: str) -> Iterator[dict[str, str]]:
    """Yields `{"text": JSON of an example}` for each row of a table; rows that lack a column are left out.

    Args:
        path: a table that is text: JSON lines, JSON, or separated cells.
        format: prompt_completion or messages.

    Raises:
        UserError: the file cannot be read, has no rows with these columns, or a row is no example.
    """
    with readable_table(path):
        found = False
        for where, row in _rows(Path(path), format):
            try:
                text = example_text(row, format)
            except UserError as error:
                raise UserError(f"{where} of {path}: {error}") from None
            if text:
                found = True
                yield {"text": text}
    if not found:
        names = " and ".join(COLUMNS[format])
        raise EmptyTableError(f"{path} has no rows with {names}; give another file, or another data.format")


def example_text(row: Any, format: str) -> str:
    """A row as JSON; empty where it lacks a column.

    Raises:
        UserError: what is in a column is no example.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"it is no object; give rows with {' and '.join(COLUMNS[format])}")
    values: dict[str, Any] = {name: row.get(name) for name in COLUMNS[format]}
    if any(value is None for value in values.values()):
        return ""
    if format == MESSAGES:
        values["messages"] = _messages(values["messages"], "messages")
        if not any(each["role"] == "assistant" for each in values["messages"]):
            raise UserError("no message has the role assistant; give conversations with answers to learn")
    elif all(isinstance(value, str) for value in values.values()):
        if not values["completion"]:
            return ""
    else:
        values = {name: _messages(value, name) for name, value in values.items()}
    return json.dumps(values, ensure_ascii=False)


def _messages(value: Any, name: str) -> list[dict[str, Any]]:
    whole = isinstance(value, list) and all(isinstance(each, Mapping) and "role" in each for each in value)
    if not whole or not value:
        raise UserError(f"{name} is no list of messages; give some such as {{'role': 'user', 'content': ...}}")
    return [{key: part for key, part in each.items() if part is not None} for each in value]


def _rows(path: Path, format: str) -> Iterator[tuple[str, Any]]:
    """Yields rows and their places."""
    if suffix_inside(path) not in SEPARATORS:
        yield from json_rows(path)
        return
    if format == MESSAGES:
        raise UserError(f"{path} has cells of text, and no lists of messages; give JSON lines or parquet")
    first, second = (dict(separated_cells(path, column)) for column in COLUMNS[format])
    for number, prompt in first.items():
        yield f"row {number}", {"prompt": prompt, "completion": second.get(number)}
