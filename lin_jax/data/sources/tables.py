"""Tables with one document a row, from local files or the Hugging Face Hub, as streams of their text."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lin_jax.data.config import TEXT, DataConfig
from lin_jax.data.sources.examples import COLUMNS, example_text, read_examples
from lin_jax.data.sources.files import suffix_inside
from lin_jax.data.sources.remote import HUB_PREFIX, asking_the_hub
from lin_jax.data.sources.rows import TEXT_TABLES, EmptyTableError, read_cells
from lin_jax.errors import UserError
from lin_jax.extras import require

if TYPE_CHECKING:
    from datasets import IterableDataset

log = logging.getLogger(__name__)

TABLES = (*TEXT_TABLES, ".parquet", ".arrow")
# Inside a folder, .json, .csv and .tsv files are more often settings and source material than corpora.
_IN_FOLDERS = (".jsonl", ".ndjson", ".parquet", ".arrow")


def is_table(path: Path, *, in_folder: bool) -> bool:
    """True if a file is a table by its name; `in_folder` if a folder was named, not the file itself."""
    return suffix_inside(path) in (_IN_FOLDERS if in_folder else TABLES)


def open_tables(paths: Sequence[Path], column: str, format: str = TEXT) -> "IterableDataset":
    """Opens local tables as one stream of rows `{"text": str}`, file after file, without any network access.

    Rows without text are left out, and so are tables without rows, with a warning, if another has some. Rows of another
    format than text are examples, whose text is their JSON; the column is of no effect then.

    Raises:
        UserError: a file cannot be read or lacks the column, or all are empty.
    """
    streams = []
    for path in paths:
        try:
            with readable(str(path)):
                streams.append(_open_table(path, column, format))
        except EmptyTableError:
            if path == paths[-1] and not streams:
                raise
            log.warning("%s: left out, it has no rows", path)
    return concatenated(streams)


def concatenated(streams: Sequence["IterableDataset"]) -> "IterableDataset":
    """Concatenates one or more streams."""
    return streams[0] if len(streams) == 1 else _datasets().concatenate_datasets(list(streams))


def open_hub(config: DataConfig) -> "IterableDataset":
    """Opens a split of a hub data set as a stream of rows `{"text": str}`; downloads it first unless streaming.

    Raises:
        UserError: the data set cannot be reached, or lacks the configuration, split or column.
    """
    load_dataset = _datasets().load_dataset
    name = config.sources[0].removeprefix(HUB_PREFIX)
    with readable(config.sources[0]), asking_the_hub(config.sources[0], "its text as files (.txt, .jsonl, .parquet)"):
        rows = load_dataset(name, config.subset, split=config.split, streaming=config.streaming)
        if not config.streaming:
            rows = rows.to_iterable_dataset()
        return _text_rows(rows, config.text_field, config.sources[0], config.format)


def read_rows(stream: "IterableDataset", source: str) -> Iterator[str]:
    """Yields the texts of a stream, with the reader's failures as one-line errors.

    Raises:
        UserError: the source turns out to be damaged.
    """
    with readable(source):
        for row in stream:
            yield row["text"]


def _open_table(path: Path, column: str, format: str) -> "IterableDataset":
    """Opens one file by its kind; these readers, unlike `load_dataset`, never report to the hub."""
    datasets = _datasets()
    kind = suffix_inside(path)
    if kind not in TEXT_TABLES:
        # Its readers log what they raise, too; the error says it once.
        logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
        rows = (
            datasets.IterableDataset.from_file(str(path))
            if kind == ".arrow"
            else datasets.IterableDataset.from_parquet(str(path))
        )
        return _text_rows(rows, column, str(path), format)
    # What is wrong at the beginning of a table is found out before a run begins.
    read: Any = read_cells if format == TEXT else read_examples
    arguments = {"path": str(path), **({"column": column} if format == TEXT else {"format": format})}
    next(read(**arguments), None)
    features = datasets.Features({"text": datasets.Value("string")})
    return datasets.IterableDataset.from_generator(read, features, gen_kwargs=arguments)


def _datasets() -> Any:
    """The package, which takes seconds to import."""
    return require("datasets", "reading a table or a data set of the Hub")


def _text_rows(rows: "IterableDataset", column: str, source: str, format: str) -> "IterableDataset":
    """Keeps one column, under the name "text", and the rows that have something in it."""
    first = next(iter(rows), None)
    if first is None:
        raise EmptyTableError(f"{source} has no rows; give another file or split")
    if format != TEXT:
        return _example_rows(rows, first, format, source)
    if column not in first:
        columns = ", ".join(sorted(first))
        raise UserError(f"{source} has no column {column!r}; set text_field to one of its columns: {columns}")
    if not isinstance(first[column], str | None):
        kind = type(first[column]).__name__
        raise UserError(f"column {column!r} of {source} holds {kind}, not text; set text_field to a text column")
    texts = rows.select_columns([column])
    if column != "text":
        texts = texts.rename_column(column, "text")
    return texts.filter(_has_text)


def _example_rows(rows: "IterableDataset", first: dict[str, Any], format: str, source: str) -> "IterableDataset":
    """Rows as JSON of examples, under the name "text"."""
    if missing := [name for name in COLUMNS[format] if name not in first]:
        columns = ", ".join(sorted(first))
        raise UserError(f"{source} has no column {missing[0]!r}, which format {format} needs; it has {columns}")
    example_text(first, format)
    texts = rows.map(partial(_example_row, format=format), remove_columns=list(first))
    return texts.filter(_has_text)


def _example_row(row: dict[str, Any], format: str) -> dict[str, str]:
    return {"text": example_text(row, format)}


def _has_text(row: dict[str, Any]) -> bool:
    return bool(row["text"] and row["text"].strip())


@contextmanager
def readable(source: str) -> Iterator[None]:
    """Turns any exception of a reader into a one-line `UserError`: there are dozens of kinds."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise UserError(f"cannot read {source}: {reason}; check its name and content") from error
