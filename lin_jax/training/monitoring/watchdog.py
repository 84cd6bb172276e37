"""A thread that calls out when something lasts too long, while it lasts."""

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

from lin_jax.errors import UserError
from lin_jax.training.hooks import Hook, Training


@dataclass(frozen=True)
class MonitoringConfig:
    """Waits that are reported while they last.

    Attributes:
        stall_seconds: a wait for data as long as this is reported.
        hang_seconds: a step that takes as long as this has the program's stack printed; null does not watch.
    """

    stall_seconds: float = 10.0
    hang_seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("stall_seconds", "hang_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"training.monitoring.{name} is {value}; give a positive number")


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
    """Formats the stack of the main thread like a traceback."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "".join(traceback.format_stack(frame)) if frame is not None else ""


class HangWatch(Hook):
    """Prints the program's stack when a step takes too long.

    Args:
        watchdog: notices it.
        seconds: limit; None does not watch.
    """

    def __init__(self, watchdog: Watchdog, seconds: float | None) -> None:
        self._watchdog = watchdog
        self._seconds = seconds

    def around_step(self, training: Training) -> AbstractContextManager[None]:
        """Watches a step."""
        return self._watchdog.limit(self._seconds, lambda: self._hangs(training))

    def _hangs(self, training: Training) -> None:
        training.alarm(
            f"nothing has happened for {self._seconds:g} s near step {training.step}; the program is here:\n"
            f"{main_stack()}"
        )
