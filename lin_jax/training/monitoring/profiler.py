"""Traces of a few steps, for TensorBoard's profiler and for xprof."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax

from lin_jax.errors import UserError
from lin_jax.training.hooks import Hook, Training
from lin_jax.training.train_step import StepMetrics

PROFILE_FOLDER = "profile"


@dataclass(frozen=True)
class ProfileConfig:
    """Steps that are traced, into `OUTPUT/profile`.

    Attributes:
        start: the first step traced (from 1); not the very first of a run, which waits for much that others do not.
        steps: how many; 0 traces none.
    """

    start: int = 10
    steps: int = 0

    def __post_init__(self) -> None:
        for name, least in (("start", 1), ("steps", 0)):
            if getattr(self, name) < least:
                raise UserError(f"training.profile.{name} is {getattr(self, name)}; give {least} or more")


class Profiler(Hook):
    """Traces steps when their turn comes.

    Args:
        config: which.
        folder: the run's folder.
    """

    def __init__(self, config: ProfileConfig, folder: Path) -> None:
        self.folder = folder / PROFILE_FOLDER
        self._traced = range(config.start, config.start + config.steps)
        self._running = False

    @contextmanager
    def around_dispatch(self, training: Training) -> Iterator[None]:
        """Marks the next step in the trace, if it is to be traced."""
        step = training.step + 1
        if step not in self._traced:
            yield
            return
        if not self._running:
            jax.profiler.start_trace(str(self.folder))
            self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def on_step(self, training: Training, metrics: StepMetrics) -> None:
        """Writes the trace when the devices have finished the last step of it."""
        if self._running and training.step >= self._traced[-1]:
            with training.paused():
                self.close()
                shown = f"traced; to look at it: pip install xprof, then xprof --logdir {self.folder}"
                training.note(f"step {training.step}: {shown}")

    def close(self) -> None:
        """Writes what there is of a trace."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
