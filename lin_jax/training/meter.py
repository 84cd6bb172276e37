"""The figures that tell of the machine: speed, utilisation, memory, waiting, and the time that is left."""

import time
from typing import Any

from lin_jax.training.clock import Clock
from lin_jax.training.efficiency import utilisation
from lin_jax.training.memory import peak_memory
from lin_jax.training.waiting import WatchedInput

# These differ between two runs that compute the very same.
MACHINE_FIGURES = frozenset(
    {"seconds", "seconds_left", "tokens_per_second", "wait_seconds", "peak_memory_bytes", "mfu"}
)


class Meter:
    """Measures the steps of a run between its lines of metrics.

    Args:
        clock: training time.
        batches: know how long was waited for them.
        done: steps taken before.
        steps: of the whole run.
        tokens: of a step, over all processes.
        flops: operations of a step, over all processes.
    """

    def __init__(self, clock: Clock, batches: WatchedInput, *, done: int, steps: int, tokens: int, flops: float):
        self._clock = clock
        self._batches = batches
        self._logged = self._done = done
        self._steps = steps
        self._tokens = tokens
        self._flops = flops
        self._began = time.monotonic()
        self._first_ended: float | None = None

    def start(self) -> None:
        """The program is compiled, and its first step about to be taken."""
        self._began = time.monotonic()
        self._clock.start()
        self._batches.start()

    def advance(self) -> None:
        """A step is done."""
        if self._first_ended is None:
            self._first_ended = time.monotonic()

    def lap(self, step: int) -> dict[str, Any]:
        """Figures of the steps since the last lap."""
        steps, seconds = step - self._logged, max(self._clock.lap(), 1e-9)
        self._logged = step
        used = utilisation(self._flops * steps, seconds)
        return {
            "tokens": step * self._tokens,
            "tokens_per_second": round(steps * self._tokens / seconds, 1),
            **({} if used is None else {"mfu": round(used, 4)}),
            "peak_memory_bytes": peak_memory(),
            "wait_seconds": round(self._batches.lap(seconds, steps), 6),
            "seconds": round(self._clock.seconds, 3),
            "seconds_left": round(self._left(step), 1),
        }

    def _left(self, step: int) -> float:
        """From the steps so far, but for the first, if there are others: it is slow, as much happens for once."""
        taken, now = step - self._done, time.monotonic()
        if taken > 1 and self._first_ended is not None:
            return (now - self._first_ended) / (taken - 1) * (self._steps - step)
        return (now - self._began) * (self._steps - step)
