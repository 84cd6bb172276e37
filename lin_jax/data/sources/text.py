"""Documents from the standard library's sources, from text files and folders, from tables, or from the Hub."""

import logging
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from lin_jax.data.config import AUTO, PYTHON_STDLIB, TEXT, DataConfig
from lin_jax.data.sources.files import PACKED, UNREADABLE, list_files, read_text
from lin_jax.data.sources.remote import DATA_SET, RemoteName, fetch_file, is_remote
from lin_jax.data.sources.rows import EmptyTableError
from lin_jax.data.sources.tables import TABLES, concatenated, is_table, open_hub, open_tables, read_rows
from lin_jax.data.tokenizers.tokenizer import END_OF_TEXT
from lin_jax.errors import UserError

if TYPE_CHECKING:
    from datasets import IterableDataset

log = logging.getLogger(__name__)

# Installed packages, tests (bulky and repetitive) and character tables: not the library's own prose and code.
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
_LARGEST_STDLIB_FILE = 200_000
# Source code and papers that write about the marker put it in quotes on both sides.
_QUOTES = ('"', "'", "`")


@dataclass(frozen=True, slots=True)
class Document:
    """A text that is tokenized as a unit: attention and state never cross from one document to another.

    Attributes:
        name: of its file or row, for messages.
        text: the whole text, never blank.
    """

    name: str
    text: str


@dataclass
class _Notes:
    """Files of a source that are not read as they stand.

    Attributes:
        skipped: names of those that are not UTF-8 text.
        cut: names of those that are cut at a marker nobody named.
    """

    skipped: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)

    def log(self, config: DataConfig) -> None:
        """Logs a line for each kind."""
        if self.skipped:
            first = self.skipped[0]
            log.warning(
                "%s: left out %d files that are not UTF-8 text, %s first", config.source, len(self.skipped), first
            )
        if self.cut:
            files = self.cut[0] if len(self.cut) == 1 else f"{len(self.cut)} files ({self.cut[0]} first)"
            # A source that is one file is that file.
            which = config.name if config.name.endswith(files) else f"{files} of {config.name}"
            _warn_once(
                f"{which} cut into documents at {END_OF_TEXT}; data.document_separator null keeps each file whole"
            )


@cache
def _warn_once(message: str) -> None:
    """Logs what is the same each time that a source is read."""
    log.warning(message)


def open_documents(config: DataConfig) -> "Sequence[Document] | IterableDataset":
    """Opens a source as a stream or in memory, as `config.streaming` asks; raises as the two functions below do."""
    return stream_documents(config) if config.streaming else read_documents(config)


def read_documents(config: DataConfig) -> tuple[Document, ...]:
    """Reads all documents of a source into memory, in an order that depends on names alone.

    Files that are not UTF-8 text are left out, with one logged warning that counts them. Hidden files
    are not looked at. The parts of a mixture come one after another.

    Raises:
        UserError: the source is missing, empty, unreadable, of an unsupported kind, or lacks the column.
    """
    if config.mixture:
        return tuple(document for part in config.parts for document in read_documents(part))
    notes = _Notes()
    documents = tuple(_capped(_each_document(config, notes), config.max_bytes, cut=config.format == TEXT))
    notes.log(config)
    if not documents:
        raise UserError(f"data source {config.source!r} holds no text; give a file or folder with text in it")
    return documents


def stream_documents(config: DataConfig) -> "IterableDataset":
    """Opens tables or a hub data set as a stream of rows `{"text": str}`, read as they are asked for.

    The parts of a mixture come one after another.

    Raises:
        UserError: the source is missing, not made of tables, unreadable, or lacks the column.
    """
    if config.mixture:
        return concatenated([stream_documents(part) for part in config.parts])
    if config.is_hub:
        return open_hub(config)
    roots = [_local(source, config) for source in config.sources]
    tables = [path for root in roots for path in list_files(root) if is_table(path, in_folder=root.is_dir())]
    if not tables:
        raise UserError(
            f"data source {config.source!r} cannot be streamed; leave streaming off, "
            f"or give tables: {', '.join(TABLES)}"
        )
    return open_tables(tables, config.text_field, config.format)


def _each_document(config: DataConfig, notes: _Notes) -> Iterator[Document]:
    if config.is_hub:
        yield from _numbered(config.sources[0], read_rows(open_hub(config), config.sources[0]))
    elif config.source == PYTHON_STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        yield from _text_documents(root, _stdlib_files(root), config.document_separator, notes)
    else:
        for root in [_local(source, config) for source in config.sources]:
            yield from _under(root, config, notes)


def _under(root: Path, config: DataConfig, notes: _Notes) -> Iterator[Document]:
    files = list_files(root)
    tables = [path for path in files if is_table(path, in_folder=root.is_dir())]
    texts = [path for path in files if path not in set(tables)]
    if config.format != TEXT and texts:
        if root in texts:
            raise UserError(f"{root} is no table, and format {config.format} is for tables: {', '.join(TABLES)}")
        texts = []
    yield from _text_documents(root, texts, config.document_separator, notes)
    for path in tables:
        try:
            rows = read_rows(open_tables([path], config.text_field, config.format), str(path))
        except EmptyTableError:
            if path == root:
                raise
            log.warning("%s: left out, it has no rows", path)
            continue
        yield from _numbered(_name(path, root), rows)


def _local(source: str, config: DataConfig) -> Path:
    """The path of a source; what is remote is fetched, of a text only as much as is read."""
    if is_remote(source):
        name = Path(str(RemoteName.parse(source).file))
        is_text = not is_table(name, in_folder=False) and name.suffix.lower() not in PACKED
        return fetch_file(source, DATA_SET, config.max_bytes if is_text else None)
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(
            f"data source {source!r} does not exist; give a file, a folder, '{PYTHON_STDLIB}', or 'hub:OWNER/NAME'"
        )
    return path


def _stdlib_files(root: Path) -> list[Path]:
    """Lists the library's modules; not the few huge data tables, nor the build settings of this machine."""
    return [
        path
        for path in sorted(root.rglob("*.py"))
        if _NOT_STDLIB.isdisjoint(path.relative_to(root).parts)
        and not path.name.startswith("_sysconfigdata")
        and path.stat().st_size <= _LARGEST_STDLIB_FILE
    ]


def _text_documents(root: Path, paths: Sequence[Path], separator: str | None, notes: _Notes) -> Iterator[Document]:
    """Yields each text file, cut at the separator; notes others, or raises for a file named itself."""
    for path in paths:
        try:
            text = read_text(path)
        except UNREADABLE as error:
            if path == root:
                raise UserError(
                    f"{path} is not readable as UTF-8 text; give a text file, optionally {', '.join(PACKED)}, "
                    f"or a table: {', '.join(TABLES)}"
                ) from error
            notes.skipped.append(_name(path, root))
            continue
        name = _name(path, root)
        pieces = _cut(text) if separator == AUTO else text.split(separator) if separator else [text]
        if separator == AUTO and len(pieces) > 1:
            notes.cut.append(name)
        if len(pieces) > 1 or separator not in (AUTO, None):
            # The line breaks beside a marker belong to the marker's own line.
            yield from _numbered(name, (piece.strip("\r\n") for piece in pieces))
        elif text.strip():
            yield Document(name, text)


def _cut(text: str) -> list[str]:
    """Splits a text at its markers of an end, but for quoted ones."""
    first, *others = text.split(END_OF_TEXT)
    pieces = [first]
    for other in others:
        if pieces[-1].endswith(_QUOTES) and other.startswith(_QUOTES):
            pieces[-1] += END_OF_TEXT + other
        else:
            pieces.append(other)
    return pieces


def _name(path: Path, root: Path) -> str:
    return path.name if path == root else path.relative_to(root).as_posix()


def _numbered(name: str, texts: Iterator[str]) -> Iterator[Document]:
    for number, text in enumerate(texts):
        if text.strip():
            yield Document(f"{name}:{number}", text)


def _capped(documents: Iterator[Document], max_bytes: int | None, *, cut: bool) -> Iterator[Document]:
    """Yields documents up to `max_bytes` of UTF-8, the last one truncated to fit, or left out."""
    left = max_bytes
    for document in documents:
        if left is None:
            yield document
            continue
        data = document.text.encode()
        if len(data) < left:
            yield document
            left -= len(data)
            continue
        text = data[:left].decode(errors="ignore")
        if cut and text.strip():
            yield Document(document.name, text)
        return
