"""How long training itself has taken, over all parts of a run."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Runs from `start`; does not count what happens inside `paused`.

    Args:
        seconds: training time of earlier parts of the run.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self._gone = seconds
        self._running_since: float | None = None
        self._lap_began = seconds

    @property
    def seconds(self) -> float:
        """Training time so far."""
        since = self._running_since
        return self._gone + (0.0 if since is None else time.monotonic() - since)

    def start(self) -> None:
        """Begins, or goes on, to count."""
        self._running_since = time.monotonic()

    def lap(self) -> float:
        """Seconds since the last lap, or since the start."""
        now = self.seconds
        took, self._lap_began = now - self._lap_began, now
        return took

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count what happens inside."""
        running, self._gone, self._running_since = self._running_since is not None, self.seconds, None
        try:
            yield
        finally:
            if running:
                self.start()
