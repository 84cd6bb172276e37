"""Failures of a storage, from what it says of itself."""

import errno
import re

# As tensorstore, which reports failures of the system as text, writes their numbers.
_CODE = re.compile(r"os_error_code='(\d+)'")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
