"""Folders that are written over several tries: finished files of an interrupted one are checked, and kept."""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lin_jax.errors import UserError
from lin_jax.files import write_durably
from lin_jax.hub.conversion.tensor_file import StreamedTensor, file_sha256, write_file
from lin_jax.hub.save import UNFINISHED, check_output_folder, replace_content

JOURNAL, LOCK, PART = ".journal.json", ".lock", ".part"

log = logging.getLogger(__name__)


@dataclass
class UnfinishedFolder:
    """A folder beside the one that is asked for, or in it, until it is whole.

    Attributes:
        path: the folder.
        fingerprint: of all that its files follow from.
        finished: bytes and SHA-256 of every finished file of tensors, by its name.
    """

    path: Path
    fingerprint: str
    finished: dict[str, list[Any]] = field(default_factory=dict)

    def take_up(self) -> None:
        """Keeps the finished files of an earlier try at the same folder, and removes all else."""
        found: Any = {}
        if (self.path / JOURNAL).is_file():
            try:
                found = json.loads((self.path / JOURNAL).read_text(encoding="utf-8"))
            except ValueError:
                log.warning("%s is damaged; the conversion starts anew", self.path / JOURNAL)
        if found.get("fingerprint") == self.fingerprint:
            self.finished = {name: said for name, said in found["files"].items() if self._is_whole(name, *said)}
        for path in self.path.iterdir():
            if path.name not in (*self.finished, LOCK):
                path.unlink()
        self._write_journal()
        if self.finished:
            log.warning("%d finished files of an interrupted conversion are kept", len(self.finished))

    def write(self, tensors: Mapping[str, StreamedTensor], path: Path, note: Callable[[int], Any]) -> None:
        """Writes a file of tensors, unless an earlier try has; arguments as in `write_file`."""
        if path.name in self.finished:
            note(sum(tensor.nbytes for tensor in tensors.values()))
            return
        part = path.with_name(path.name + PART)
        checksum = write_file(tensors, part, note)
        os.replace(part, path)
        self.finished[path.name] = [path.stat().st_size, checksum]
        self._write_journal()

    def leave(self) -> bool:
        """Leaves finished files to a later try; False, and the folder is removed, if there are none."""
        if not self.finished:
            self.remove()
            return False
        for path in self.path.glob(f"*{PART}"):
            path.unlink()
        return True

    def remove(self) -> None:
        """Removes the folder and all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _is_whole(self, name: str, size: int, checksum: str) -> bool:
        path = self.path / name
        if path.is_file() and path.stat().st_size == size and file_sha256(path) == checksum:
            return True
        log.warning("%s is not what was written; it is made anew", path)
        return False

    def _write_journal(self) -> None:
        content = {"fingerprint": self.fingerprint, "files": self.finished}
        write_durably(self.path / JOURNAL, json.dumps(content, indent=2) + "\n")


@contextmanager
def resumable_folder(folder: Path, fingerprint: str, *, overwrite: bool) -> Iterator[UnfinishedFolder]:
    """Yields a folder that becomes the given one on success; interrupted, it keeps its finished files for a later try.

    Args:
        folder: the folder that is asked for.
        fingerprint: of all that its files follow from; finished files of another one are removed.
        overwrite: replace the content of the folder.

    Raises:
        UserError: the folder is not empty, cannot be written, or is being written by another process.
    """
    check_output_folder(folder, overwrite=overwrite)
    folder = folder.absolute()
    exists = folder.is_dir()
    path = folder / UNFINISHED if exists else folder.with_name(f".{folder.name}{UNFINISHED}")
    unfinished = UnfinishedFolder(path, fingerprint)
    with _locked(path):
        try:
            unfinished.take_up()
            yield unfinished
            for name in (JOURNAL, LOCK):
                (path / name).unlink()
            if exists:
                replace_content(folder, path)
                path.rmdir()
            else:
                os.replace(path, folder)
        except OSError as error:
            kept = f"what is finished is kept in {path}, and the same command goes on from there"
            remedy = kept if unfinished.leave() else "give another folder"
            raise UserError(f"cannot write {folder}: {error.strerror or error}; {remedy}") from error
        except UserError:
            unfinished.remove()
            raise
        except BaseException:
            if unfinished.leave():
                log.warning("interrupted: what is finished is kept in %s; the same command goes on from there", path)
            raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Makes a folder, and holds it alone.

    Raises:
        UserError: it cannot be made, or another process holds it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = (path / LOCK).open("w")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; give another folder") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process is writing {path}; wait for it, or give another folder") from error
        yield
