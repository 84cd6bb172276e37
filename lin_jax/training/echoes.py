"""What Orbax and its storage print of a failure that is raised all the same: kept off the terminal."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def without_echoes() -> Iterator[None]:
    """While open, the failure of a save is told by the exception alone.

    Orbax logs it with a traceback in each thread that it passes. Writes that were under way beside the failed one
    report to an event loop that is closed by then, which Python prints.
    """
    logger, before = logging.getLogger("absl"), sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not _late(unraisable):
            before(unraisable)

    logger.addFilter(_is_news)
    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
        logger.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not (record.exc_info and "orbax" in record.pathname)


def _late(unraisable: Any) -> bool:
    error = unraisable.exc_value
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
