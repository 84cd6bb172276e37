"""A save that has failed: what goes on in the background is ended, removed and not heard of again."""

import logging
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lin_jax.training.distributed.multihost import is_first

# Seconds for threads that write to end after another one has failed.
_PATIENCE = 60.0


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


def end_writing(manager: Any) -> None:
    """Closes a manager of which a save has failed, and waits until nobody writes any more."""
    # Those of steps that the failed one came before; Python says so when it forgets them, perhaps much later.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    with suppress(Exception):
        manager.close()
    # Orbax waits for the first of its threads to fail; the others go on.
    deadline = time.monotonic() + _PATIENCE
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
            with suppress(Exception):
                thread.join(max(deadline - time.monotonic(), 0))


def remove_unfinished(folder: Path) -> None:
    """Removes checkpoints that have no name yet; the first process does it."""
    for path in folder.glob("*.orbax-checkpoint-tmp*") if is_first() else ():
        # A write that was under way may bring a file back.
        for _ in range(20):
            shutil.rmtree(path, ignore_errors=True)
            if not path.exists():
                break
            time.sleep(0.05)
