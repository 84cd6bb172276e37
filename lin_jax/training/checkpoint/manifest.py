"""The manifest of a checkpoint: size and checksum of every file, so that a damaged one is found before it is used."""

import hashlib
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lin_jax.files import sync_folder, write_durably

MANIFEST_FILE = "manifest.json"

# Orbax puts the time into these when all else is written, the manifest too. Nothing is ever read from them.
_STAMPS = ("_CHECKPOINT_METADATA", "commit_success.txt")
_THREADS = 8


def seal(folder: Path) -> None:
    """Writes the manifest of a folder whose files are complete, and brings them all to the disk.

    Raises:
        OSError: a file cannot be read, or the manifest not be written.
    """
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if name not in (*_STAMPS, MANIFEST_FILE)]
    with ThreadPoolExecutor(_THREADS) as pool:
        entries = list(pool.map(lambda name: _measure(folder / name), names))
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        sync_folder(path)
    files = dict(zip(names, entries, strict=True))
    write_durably(folder / MANIFEST_FILE, _plain({"checksum": _of_text(_plain(files)), "files": files}))


def damage(folder: Path, parts: tuple[str, ...] = ("",)) -> str | None:
    """Finds what is wrong with the files of a sealed folder; None if every bit is as it was written.

    Args:
        folder: holds the manifest.
        parts: only the files whose paths begin with one of these are looked at.
    """
    try:
        content = json.loads((folder / MANIFEST_FILE).read_bytes())
        files: dict[str, tuple[int, str]] = content["files"]
        whole = content["checksum"] == _of_text(_plain(files))
    except FileNotFoundError:
        return f"it has no {MANIFEST_FILE}"
    except (OSError, ValueError, TypeError, KeyError):
        whole = False
    if not whole:
        return f"its {MANIFEST_FILE} is damaged"
    wanted = {name: entry for name, entry in files.items() if name.startswith(parts)}
    # Sizes first: they are known at once, and tell of most that is torn.
    with ThreadPoolExecutor(_THREADS) as pool:
        for check in (_wrong_size, _changed):
            problems = pool.map(lambda name, check=check: check(folder / name, *wanted[name]), wanted)
            for name, problem in zip(wanted, problems, strict=True):
                if problem is not None:
                    return f"{name} {problem}"
    return None


def _wrong_size(path: Path, size: int, checksum: str) -> str | None:
    try:
        found = path.stat().st_size
    except OSError as error:
        return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
    return None if found == size else f"has {found} bytes, not {size}"


def _changed(path: Path, size: int, checksum: str) -> str | None:
    try:
        with path.open("rb") as file:
            found = _checksum(file)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if found == checksum else "does not have its checksum"


def _measure(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        checksum = _checksum(file)
        os.fsync(file.fileno())
        return file.tell(), checksum


def _checksum(file: io.BufferedReader | io.BytesIO) -> str:
    return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _plain(content: dict[str, Any]) -> str:
    """JSON without a space or line break, so that there is no bit in it that may change unseen."""
    return json.dumps(content, separators=(",", ":"))


def _of_text(text: str) -> str:
    return _checksum(io.BytesIO(text.encode()))
