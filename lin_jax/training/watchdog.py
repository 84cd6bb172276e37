"""A thread that calls out when something lasts too long, while it lasts."""

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import NamedTuple


class _Limit(NamedTuple):
    deadline: float
    cry: Callable[[], None]


class Watchdog:
    """Watches one thing at a time. A context manager: leaving ends its thread.

    Args:
        pause: seconds between looks.
    """

    def __init__(self, pause: float = 0.2) -> None:
        self._pause = pause
        self._limit: _Limit | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    @contextmanager
    def limit(self, seconds: float | None, cry: Callable[[], None]) -> Iterator[None]:
        """Calls `cry` once, from another thread, if what is inside lasts longer than so many seconds."""
        if seconds is None:
            yield
            return
        self._limit = _Limit(time.monotonic() + seconds, cry)
        try:
            yield
        finally:
            self._limit = None

    def _watch(self) -> None:
        cried: _Limit | None = None
        while not self._ended.wait(self._pause):
            limit = self._limit
            if limit is not None and limit is not cried and time.monotonic() > limit.deadline:
                cried = limit
                limit.cry()


def main_stack() -> str:
    """What the main thread is doing, as a traceback has it."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "".join(traceback.format_stack(frame)) if frame is not None else ""
