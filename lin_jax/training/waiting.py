"""The wait for data: how long it is, and whose fault when it is too long."""

import time
from collections.abc import Callable, Iterator
from typing import Any

from lin_jax.training.watchdog import Watchdog

# A share of the time beyond which the input, not the model, sets the pace; and seconds that are too few to tell.
_TOO_MUCH = 0.5
_TOO_FEW = 1.0


class WatchedInput:
    """Batches, and the time it takes to get them.

    Args:
        batches: where they come from.
        source: tells what messages call it; asked when there is something to say.
        stall_seconds: a single wait as long as this is said aloud, while it lasts.
        watchdog: notices it.
        alarm: says it.
    """

    def __init__(
        self,
        batches: Iterator[Any],
        source: Callable[[], str],
        stall_seconds: float,
        watchdog: Watchdog,
        alarm: Callable[[str], None],
    ) -> None:
        self._batches = batches
        self._source = source
        self._stall_seconds = stall_seconds
        self._watchdog = watchdog
        self._alarm = alarm
        self._waited = 0.0
        self._starved = 0.0
        self._passed = 0.0
        self._said = False

    def start(self) -> None:
        """Training begins: what went before does not count."""
        self._waited = self._starved = 0.0

    def next(self, idle: Callable[[], bool]) -> Any:
        """The next batch.

        Args:
            idle: tells whether the devices have nothing left to do; a wait until then keeps nobody waiting.
        """
        begun = time.monotonic()
        with self._watchdog.limit(None if self._said else self._stall_seconds, self._stalled):
            batch = next(self._batches)
        took = time.monotonic() - begun
        self._waited += took
        if idle():
            self._starved += took
        return batch

    def lap(self, seconds: float, steps: int) -> float:
        """Seconds waited a step since the last lap, which was so many seconds and steps ago."""
        waited, self._waited = self._waited, 0.0
        self._passed += seconds
        if self._passed >= _TOO_FEW:
            if self._starved > _TOO_MUCH * self._passed and not self._said:
                self._alarm(
                    f"{self._starved:.3g} of the last {self._passed:.3g} s passed waiting for data from "
                    f"{self._source()}; the input is slower than the model: prepare the text beforehand, or give it "
                    "more readers"
                )
            self._starved, self._passed = 0.0, 0.0
        self._said = False
        return waited / max(steps, 1)

    def _stalled(self) -> None:
        self._said = True
        self._alarm(
            f"waited {self._stall_seconds:g} s for data from {self._source()}, and still waiting; "
            "is its disk, network or tokenizer stuck?"
        )
