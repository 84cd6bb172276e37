"""Figures of the machine: speed, utilization, memory, waits for data, and the time that is left."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import jax

from lin_jax.evaluation.flops import utilisation
from lin_jax.training.hooks import Figures, Hook, Training
from lin_jax.training.monitoring.input_stalls import InputStalls
from lin_jax.training.train_step import StepMetrics

# These differ between two runs that compute the very same.
MACHINE_FIGURES = frozenset(
    {"seconds", "seconds_left", "tokens_per_second", "wait_seconds", "peak_memory_bytes", "mfu"}
)


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


def peak_memory() -> int:
    """Bytes: the most that any device of this process has held; on a CPU, the most of the process itself."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [each["peak_bytes_in_use"] for each in stats if each and "peak_bytes_in_use" in each]
    return max(peaks) if peaks else _resident()


def _resident() -> int:
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest


class Throughput(Hook):
    """Measures speed, utilization, memory and time left between lines of metrics.

    Args:
        clock: training time.
        stalls: waits for batches; None does not report them.
        done: steps taken before.
        tokens: of a step, over all processes.
        flops: operations of a step, over all processes.
    """

    def __init__(self, clock: Clock, stalls: InputStalls | None, *, done: int, tokens: int, flops: float) -> None:
        self._clock = clock
        self._stalls = stalls
        self._logged = self._done = done
        self._tokens = tokens
        self._flops = flops
        self._began = time.monotonic()
        self._first_ended: float | None = None

    def around_pause(self, training: Training) -> AbstractContextManager[None]:
        """Stops the clock."""
        return self._clock.paused()

    def on_compiled(self, training: Training) -> None:
        """Starts the clock."""
        self._began = time.monotonic()
        self._clock.start()

    def on_step(self, training: Training, metrics: StepMetrics) -> None:
        """Notes when the first step ended."""
        if self._first_ended is None:
            self._first_ended = time.monotonic()

    def figures(self, training: Training) -> Figures:
        """Figures of the steps since the last line of metrics."""
        steps, seconds = training.step - self._logged, max(self._clock.lap(), 1e-9)
        self._logged = training.step
        used = utilisation(self._flops * steps, seconds)
        waited = {} if self._stalls is None else {"wait_seconds": round(self._stalls.lap(training, seconds, steps), 6)}
        return {
            "tokens": training.step * self._tokens,
            "tokens_per_second": round(steps * self._tokens / seconds, 1),
            **({} if used is None else {"mfu": round(used, 4)}),
            "peak_memory_bytes": peak_memory(),
            **waited,
            "seconds": round(self._clock.seconds, 3),
            "seconds_left": round(self._left(training), 1),
        }

    def _left(self, training: Training) -> float:
        """Estimates the time left, from the steps so far without the first, which is slow, if there are others."""
        taken, now, left = training.step - self._done, time.monotonic(), training.steps - training.step
        if taken > 1 and self._first_ended is not None:
            return (now - self._first_ended) / (taken - 1) * left
        return (now - self._began) * left
