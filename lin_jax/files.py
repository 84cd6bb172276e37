"""Files that are written as a whole or not at all, and copies of files of others."""

import codecs
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """Yields the name of a new file beside the given one, which takes its place at the end; on an error it is removed.

    Of several writers each has a file of its own, and the last one to end wins.

    Raises:
        OSError: it could not be written; the file is what it was before.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.partial")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_durably(path: Path, text: str) -> None:
    """Writes a file as a whole or not at all, whenever the process or the machine dies.

    Raises:
        OSError: it could not be written; the file is what it was before.
    """
    with replacement(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def has_mark(path: Path) -> bool:
    """True for a file of JSON or text that begins with a byte-order mark of UTF-8, which some editors put there."""
    if path.suffix not in (".json", ".txt"):
        return False
    with path.open("rb") as file:
        return file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8


def copy_without_mark(path: Path, to: Path) -> None:
    """Copies a file; without the byte-order mark in front of JSON or text, which few readers expect.

    Raises:
        OSError: one cannot be read, or the other not be written.
    """
    with path.open("rb") as source, to.open("wb") as copy:
        if has_mark(path):
            source.seek(len(codecs.BOM_UTF8))
        shutil.copyfileobj(source, copy)


def sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk, as `fsync` does with the content of a file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
