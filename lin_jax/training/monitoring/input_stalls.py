"""Waits for data: how long they are, and a warning that names the source when they are too long."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lin_jax.training.hooks import Hook, Training
from lin_jax.training.monitoring.watchdog import Watchdog

# A share of the time beyond which the input, not the model, sets the pace; and seconds that are too few to tell.
_TOO_MUCH = 0.5
_TOO_FEW = 1.0


class InputStalls(Hook):
    """Measures waits for batches, and warns of stalls while they last.

    Args:
        source: names the source of the data, asked when there is something to report.
        stall_seconds: a single wait as long as this is reported while it lasts.
        watchdog: notices it.
    """

    def __init__(self, source: Callable[[], str], stall_seconds: float, watchdog: Watchdog) -> None:
        self._source = source
        self._stall_seconds = stall_seconds
        self._watchdog = watchdog
        self._waited = 0.0
        self._starved = 0.0
        self._passed = 0.0
        self._said = False

    def on_compiled(self, training: Training) -> None:
        """Training begins: what went before does not count."""
        self._waited = self._starved = 0.0

    @contextmanager
    def around_input(self, training: Training) -> Iterator[None]:
        """Measures a wait; while the devices are still busy, it keeps nobody waiting."""
        begun = time.monotonic()
        with self._watchdog.limit(None if self._said else self._stall_seconds, lambda: self._stalled(training)):
            yield
        took = time.monotonic() - begun
        self._waited += took
        if training.idle:
            self._starved += took

    def lap(self, training: Training, seconds: float, steps: int) -> float:
        """Seconds waited a step since the last lap, which was so many seconds and steps ago."""
        waited, self._waited = self._waited, 0.0
        self._passed += seconds
        if self._passed >= _TOO_FEW:
            if self._starved > _TOO_MUCH * self._passed and not self._said:
                training.alarm(
                    f"{self._starved:.3g} of the last {self._passed:.3g} s passed waiting for data from "
                    f"{self._source()}; the input is slower than the model: prepare the text beforehand, or give it "
                    "more readers"
                )
            self._starved, self._passed = 0.0, 0.0
        self._said = False
        return waited / max(steps, 1)

    def _stalled(self, training: Training) -> None:
        self._said = True
        training.alarm(
            f"waited {self._stall_seconds:g} s for data from {self._source()}, and still waiting; "
            "is its disk, network or tokenizer stuck?"
        )
