"""Files that survive a crash, and what a storage that fails says of itself."""

import errno
import os
import re
from pathlib import Path

# As tensorstore, which reports failures of the system as text, writes their numbers.
_CODE = re.compile(r"os_error_code='(\d+)'")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_durably(path: Path, text: str) -> None:
    """Writes a file as a whole or not at all, whenever the process or the machine dies.

    Raises:
        OSError: it could not be written; the file is what it was before.
    """
    temporary = path.with_name(f"{path.name}.new")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk, as `fsync` does with the content of a file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def storage_failure(error: BaseException) -> int | None:
    """The system's number for what went wrong in storage, anywhere behind an exception; None if nothing there did."""
    seen: list[BaseException] = []
    while error not in seen:
        seen.append(error)
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if found := _CODE.search(str(error)):
            return int(found[1])
        error = error.__cause__ or error.__context__ or error
    return None


def no_room(failure: int) -> bool:
    """True if a failure means that more does not fit: a full disk, a quota, or a limit on the size of files."""
    return failure in _NO_ROOM
