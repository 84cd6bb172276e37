"""Rows of tables that are text (JSON, JSON lines, separated cells), one by one, so that a bad one can be named.

Every cell of a .csv or .tsv table is text, as it stands there: `NA`, `null` and `007` are words.
"""

import csv
import io
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from lin_jax.data.sources.files import UNREADABLE, open_file, suffix_inside
from lin_jax.data.tokenizers.tokenizer import whole_characters
from lin_jax.errors import UserError

log = logging.getLogger(__name__)

SEPARATORS = {".csv": ",", ".tsv": "\t"}
TEXT_TABLES = (".jsonl", ".ndjson", ".json", *SEPARATORS)
# Rows among which one must have the column: objects may lack what they have no value for.
_COLUMN_WITHIN = 1000
# Follows the last line of a table; it comes out as part of a cell if a quote was never closed.
_END = "\0end of the table\0"


class EmptyTableError(UserError):
    """A table without rows, which is no harm beside others."""


def read_cells(path: str, column: str) -> Iterator[dict[str, str]]:
    """Yields `{"text": str}` for each row of a table whose column has text in it.

    Half a character (a surrogate on its own, which JSON can spell) becomes U+FFFD; a warning counts such rows.

    Args:
        path: a file whose name, a compression left away, ends as `TEXT_TABLES` say.
        column: name of the column.

    Raises:
        UserError: the file cannot be read, has no rows, lacks the column, or a row is malformed or holds no text there.
    """
    with readable_table(path):
        is_separated = suffix_inside(Path(path)) in SEPARATORS
        cells = separated_cells(Path(path), column) if is_separated else _json_cells(Path(path), column)
        mended = []
        for number, text in cells:
            whole = whole_characters(text)
            if whole is not text:
                mended.append(number)
            if whole.strip():
                yield {"text": whole}
    if mended:
        log.warning("%s: %d rows have half a character, now U+FFFD; row %d is the first", path, len(mended), mended[0])


@contextmanager
def readable_table(path: str) -> Iterator[None]:
    """Turns failures to open, unpack or decode a file into a `UserError`."""
    try:
        yield
    except UNREADABLE as error:
        raise UserError(f"cannot read {path}: {_reason(error)}; check its name and content") from error


def _reason(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def _json_cells(path: Path, column: str) -> Iterator[tuple[int, str]]:
    seen: dict[str, None] = {}
    count, found = 0, False
    for count, (where, row) in enumerate(json_rows(path), start=1):
        if not isinstance(row, dict):
            raise UserError(
                f"{where} of {path} is {_kind(row)}, not an object; give rows such as {{{json.dumps(column)}: ...}}"
            )
        found = found or column in row
        if not found:
            seen |= dict.fromkeys(row)
            if count == _COLUMN_WITHIN:
                break
        value = row.get(column)
        if isinstance(value, str):
            yield count, value
        elif value is not None:
            raise UserError(
                f"column {column!r} of {path} holds {_kind(value)} in {where}, not text; set text_field to a text "
                "column (docs/data.md says how conversations become text)"
            )
    if not count:
        raise EmptyTableError(f"{path} has no rows; give another file or split")
    if not found:
        raise _no_column(path, column, list(seen))


def _no_column(path: Path, column: str, others: list[str]) -> UserError:
    names = ", ".join(sorted(others)) or "none"
    return UserError(
        f"{path} has no column {column!r}; set text_field to one of its columns: {names} "
        "(docs/data.md says how conversations become text)"
    )


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "text", bool: "true or false"}.get(type(value), f"{value!r}"[:40])


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields rows, each with its place: lines, or if the first line is no object, the elements of the whole file."""
    with open_file(path) as file:
        lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip(b" \t\r\n\xef\xbb\xbf"))
        first = next(lines, None)
        if first is None:
            return
        try:
            by_line = isinstance(_parsed(first[1], path, f"line {first[0]}"), dict)
        except UserError:
            by_line = False
        if by_line:
            for number, line in chain([first], lines):
                yield f"line {number}", _parsed(line, path, f"line {number}")
            return
        rest = b"".join(line for _, line in lines)
    # A file that is no JSON as a whole has a bad first line.
    try:
        whole = _parsed(first[1] + rest, path, "its content")
    except UserError:
        _parsed(first[1], path, f"line {first[0]}")
        raise
    for number, row in enumerate(whole if isinstance(whole, list) else [whole], start=1):
        yield f"row {number}", row


def _parsed(line: bytes, path: Path, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {where} is no JSON ({_reason(error)}); mend or remove it") from error


def separated_cells(path: Path, column: str) -> Iterator[tuple[int, str]]:
    """Yields the numbers of a table's rows, from 1, and the cells of one column."""
    # Documents are longer than the 131,072 characters that the module takes for a cell's limit.
    csv.field_size_limit(sys.maxsize)
    with open_file(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
        rows = csv.reader(chain(text, [_END]), delimiter=SEPARATORS[suffix_inside(path)])
        header, begin, count = None, 1, 0
        for row in rows:
            if row == [_END]:
                break
            if row and row[-1].endswith(_END):
                raise UserError(f"cannot read {path}: a quote that begins in line {begin} is not closed; close it")
            if header is None and row:
                header = row
                if column not in header:
                    raise _no_column(path, column, header)
                index = header.index(column)
            elif header is not None and row:
                count += 1
                if any(row[len(header) :]):
                    raise UserError(
                        f"cannot read {path}: line {begin} has {len(row)} cells, and the first line {len(header)}; put "
                        "quotes around cells with separators in them"
                    )
                if index < len(row):
                    yield count, row[index]
            begin = rows.line_num + 1
    if not count:
        raise EmptyTableError(f"{path} has no rows; give another file or split")
