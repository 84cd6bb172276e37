"""The training loop: steps, validations and checkpoints in an order that a resumed run repeats exactly."""

import signal
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lin_jax.errors import UserError
from lin_jax.evaluation.targets import total
from lin_jax.training.checkpoints import Checkpoints
from lin_jax.training.clock import Clock
from lin_jax.training.config import RunConfig
from lin_jax.training.progress import Progress
from lin_jax.training.setup import Run, prepare
from lin_jax.training.step import Figures
from lin_jax.training.stopping import StopRequest
from lin_jax.training.tracker import METRICS_FILE, TENSORBOARD_FOLDER, JsonLines, TensorBoard, Trackers


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        step: steps taken in all.
        stopped_by: the signal that ended the run early, or None.
    """

    step: int
    stopped_by: signal.Signals | None = None

    @property
    def status(self) -> int:
        """Exit status of a script: 0, or 128 and the signal's number, as a shell has it."""
        return 0 if self.stopped_by is None else 128 + self.stopped_by


def train(config: RunConfig, *, resume: bool = False) -> Outcome:
    """Runs a configuration to its last step, or until Ctrl-C or SIGTERM; either way there is a checkpoint then.

    Args:
        config: the run.
        resume: go on from the newest checkpoint in the run's folder; the losses are those of a run never interrupted.

    Raises:
        UserError: the configuration or the folder does not allow it, or the loss is no longer a number.
    """
    run = prepare(config, resume=resume)
    training = run.config.training
    with (
        Checkpoints(run.folder, training.keep_checkpoints, training.keep_best) as checkpoints,
        checkpoints.full_disk_told(),
    ):
        state, start = run.state, None
        if resume:
            restored = checkpoints.restore_latest(run.state, run.about)
            run.batches.set_state(restored.data)
            state, start = restored.state, restored.step
        lines = JsonLines(run.folder / METRICS_FILE, start)
        trackers = Trackers(lines, TensorBoard(run.folder / TENSORBOARD_FOLDER, start))
        with Progress(training.steps, start or 0) as progress, StopRequest() as stop:
            if start is not None:
                progress.note(f"step {start}: going on from {checkpoints.path(start)}")
            loop = Loop(run, state, start or 0, lines.seconds, trackers, checkpoints, progress)
            try:
                return loop.run_to_end(stop)
            finally:
                trackers.close()


class Loop:
    """The moving parts of one run.

    Args:
        run: what to do.
        state: where to begin.
        step: steps taken so far.
        seconds: training time so far.
        trackers: take the figures.
        checkpoints: of the run.
        progress: shows the run to a person.
    """

    def __init__(
        self,
        run: Run,
        state: Any,
        step: int,
        seconds: float,
        trackers: Trackers,
        checkpoints: Checkpoints,
        progress: Progress,
    ) -> None:
        self.run = run
        self.config = run.config.training
        self.state = state
        self.step = step
        self.trackers = trackers
        self.checkpoints = checkpoints
        self.progress = progress
        self.clock = Clock(seconds)
        self._logged = step
        self._compiled: Any = None
        self._sums = jax.jit(run.objective.sums)
        self._pending: Figures | None = None
        self._validation: tuple[int, float] | None = None

    def run_to_end(self, stop: StopRequest) -> Outcome:
        """Trains until the last step or a signal, and saves."""
        while self.step < self.config.steps and stop.signal is None:
            if self.step % self.config.evaluate_every == 0:
                self._evaluate()
            self._train()
            if self.step % self.config.checkpoint_every == 0:
                # Validated first where both are due, so that the checkpoint knows its loss; unless it is urgent.
                if self._validation_due() and stop.signal is None:
                    self._evaluate()
                self._save()
        if stop.signal is not None and self.step < self.config.steps:
            self._save()
            return self._stopped(stop.signal)
        self._evaluate()
        self._save()
        self._report()
        return Outcome(self.step)

    def _train(self) -> None:
        batch = next(self.run.batches)
        if self._compiled is None:
            self._compiled = self.run.step.lower(self.state, self.run.frozen, batch).compile()
            self.clock.start()
        self.state, figures = self._compiled(self.state, self.run.frozen, batch)
        # Figures are read one step late, so that the device never waits for the host.
        self._settle()
        self.step += 1
        self._pending = figures

    def _settle(self) -> None:
        """Waits for the newest step, and looks at its figures."""
        if self._pending is None:
            return
        figures, self._pending = jax.device_get(self._pending), None
        if not figures.finite:
            raise UserError(self._not_finite(figures))
        self.progress.advance()
        if self.step % self.config.log_every == 0 or self.step == self.config.steps:
            self._log(figures)

    def _log(self, figures: Figures) -> None:
        per_step = self.config.batch_size * self.run.config.data.sequence_length
        speed = (self.step - self._logged) * per_step / max(self.clock.lap(), 1e-9)
        self._logged = self.step
        logged = {
            "loss": float(figures.loss),
            "learning_rate": float(figures.learning_rate),
            "grad_norm": float(figures.grad_norm),
            "tokens": self.step * per_step,
            "tokens_per_second": round(speed, 1),
            "seconds": round(self.clock.seconds, 3),
            **self.run.objective.figures(figures.sums),
        }
        self.trackers.log(self.step, logged)
        self.progress.show(self.step, logged["loss"], speed)

    def _validation_due(self) -> bool:
        return self.step % self.config.evaluate_every == 0 or self.step == self.config.steps

    def _evaluate(self) -> None:
        """Validates, if that has not been done at this step."""
        if self._validation is not None and self._validation[0] == self.step:
            return
        self._settle()
        with self.clock.paused():
            sums = total(lambda batch: self._sums(self.state.params, self.run.frozen, batch), self.run.validation)
        means = sums.loss / np.maximum(sums.tokens, 1)
        figures = {"loss": float(np.dot(self.run.objective.coefficients, means)), **self.run.objective.figures(sums)}
        self._validation = (self.step, figures["loss"])
        self.trackers.log(self.step, {f"validation_{name}": value for name, value in figures.items()})
        shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self.progress.note(f"step {self.step}: validation: {shown}")

    def _save(self) -> None:
        self._settle()
        loss = self._validation[1] if self._validation is not None and self._validation[0] == self.step else None
        self.checkpoints.save(self.step, self.state, self.run.batches.get_state(), self.run.about, loss)

    def _report(self) -> None:
        text = self.run.objective.report(self.state.params, self.run.frozen, self.run.validation, self.run.folder)
        if text is not None:
            print(text)
        self.checkpoints.wait()
        self.progress.note(f"step {self.step}: finished; saved {self.run.folder}")

    def _stopped(self, by: signal.Signals) -> Outcome:
        self.checkpoints.wait()
        self.progress.note(
            f"step {self.step}: stopped by {by.name}; saved {self.checkpoints.path(self.step)}; add --resume to go on"
        )
        return Outcome(self.step, by)

    def _not_finite(self, figures: Figures) -> str:
        self.checkpoints.wait()
        what = "loss" if not np.isfinite(figures.loss) else "gradient's norm"
        value = figures.loss if what == "loss" else figures.grad_norm
        return (
            f"the {what} became {value} at step {self.step}; the last good checkpoint is "
            f"{self.checkpoints.last_good()}; lower optimizer.learning_rate or optimizer.clip_norm and go on from it "
            "with --resume"
        )
