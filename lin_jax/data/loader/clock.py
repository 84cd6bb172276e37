"""The time that each source of a batch takes to read."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class SourceClock:
    """Measures the time that each source takes to read.

    One thread reads; any thread may look at `current`.

    Attributes:
        current: the source that is being read; None between reads.

    Args:
        first: the source that counts as the slowest before any was read.
    """

    def __init__(self, first: str) -> None:
        self.current: str | None = None
        self._slowest = first
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """Measures the time of reading from a source."""
        self.current, began = name, time.monotonic()
        try:
            yield
        finally:
            self._seconds[name] += time.monotonic() - began
            self.current = None

    def lap(self) -> str:
        """Returns the source that took longest since the last lap; if none was read, the one returned then."""
        if self._seconds:
            self._slowest = max(self._seconds, key=self._seconds.__getitem__)
            self._seconds.clear()
        return self._slowest
