"""The training loop: steps, validations and checkpoints in an order that a resumed run repeats exactly."""

import signal
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lin_jax.data import merged_positions
from lin_jax.evaluation.targets import total
from lin_jax.training.checkpoints import Checkpoints
from lin_jax.training.clock import Clock
from lin_jax.training.config import RunConfig
from lin_jax.training.efficiency import matrix_flops, mixing_flops
from lin_jax.training.meter import Meter
from lin_jax.training.plot import draw_at_end
from lin_jax.training.processes import everyones
from lin_jax.training.profiling import Profiler
from lin_jax.training.progress import Progress
from lin_jax.training.roll_back import roll_back
from lin_jax.training.setup import Run, prepare
from lin_jax.training.step import Figures
from lin_jax.training.stopping import StopRequest
from lin_jax.training.tracker import Trackers, open_trackers
from lin_jax.training.trouble import Troubles
from lin_jax.training.waiting import WatchedInput
from lin_jax.training.watchdog import Watchdog, main_stack
from lin_jax.training.weights_and_biases import import_wandb


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
    if config.training.wandb.project is not None:
        import_wandb()
    run = prepare(config, resume=resume)
    with jax.set_mesh(run.placement.mesh):
        return _train(run, resume)


def _train(run: Run, resume: bool) -> Outcome:
    training = run.config.training
    with ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(run.folder, training.keep_checkpoints, training.keep_best))
        stack.enter_context(checkpoints.full_disk_told())
        state, start = run.state, None
        if resume:
            restored = checkpoints.restore_latest(run.state, run.about)
            run.batches.set_state(restored.data)
            state, start = restored.state, restored.step
        trackers = open_trackers(run.folder, run.config, start)
        stack.callback(trackers.close)
        progress = stack.enter_context(Progress(training.steps, start or 0))
        if start is not None:
            progress.note(f"step {start}: going on from {checkpoints.path(start)}")
        watchdog, stop = stack.enter_context(Watchdog()), stack.enter_context(StopRequest())
        loop = Loop(run, state, start or 0, trackers, checkpoints, progress, watchdog)
        stack.callback(loop.profiler.close)
        return loop.run_to_end(stop)


class Loop:
    """The moving parts of one run.

    Args:
        run: what to do.
        state: where to begin.
        step: steps taken so far.
        trackers: take the figures, and know the training time so far.
        checkpoints: of the run.
        progress: shows the run to a person.
        watchdog: notices what lasts too long.
    """

    def __init__(
        self,
        run: Run,
        state: Any,
        step: int,
        trackers: Trackers,
        checkpoints: Checkpoints,
        progress: Progress,
        watchdog: Watchdog,
    ) -> None:
        self.run = run
        self.config = run.config.training
        self.state = state
        self.step = step
        self.trackers = trackers
        self.checkpoints = checkpoints
        self.progress = progress
        self.watchdog = watchdog
        self.profiler = Profiler(self.config.profile, run.folder)
        self.clock = Clock(trackers.seconds)
        watch, data = self.config.watch, run.config.data
        self.batches = WatchedInput(run.batches, self._source, watch.stall_seconds, watchdog, progress.alarm)
        tokens = self.config.batch_size * data.sequence_length
        flops = matrix_flops(run.state.params, run.frozen, tokens)
        flops += mixing_flops(run.config.model, self.config.batch_size, data.sequence_length)
        self.meter = Meter(self.clock, self.batches, done=step, steps=self.config.steps, tokens=tokens, flops=flops)
        self.troubles = Troubles(watch, progress.note, self._last_good)
        self._compiled: Any = None
        self._sums = jax.jit(run.objective.sums, out_shardings=run.placement.whole)
        self._pending: Figures | None = None
        self._validation: tuple[int, float] | None = None

    def run_to_end(self, stop: StopRequest) -> Outcome:
        """Trains until the last step or a signal, and saves."""
        stopped_by = None
        while self.step < self.config.steps and (stopped_by := stop.agreed(self.state)) is None:
            if self.step % self.config.evaluate_every == 0:
                self._evaluate()
            self._train()
            if self.step % self.config.checkpoint_every == 0:
                # Validated first where both are due, so that the checkpoint knows its loss; unless it is urgent.
                if self._validation_due() and stop.signal is None:
                    self._evaluate()
                self._save()
        if stopped_by is not None:
            self._save()
            return self._stopped(stopped_by)
        self._evaluate()
        self._save()
        self._report()
        return Outcome(self.step)

    def _train(self) -> None:
        batch = self.run.placement.local_batch(self.batches.next(self._idle), self.config.batch_size)
        if self._compiled is None:
            self._compiled = self.run.step.lower(self.state, self.run.frozen, batch).compile()
            self.meter.start()
        with self.watchdog.limit(self.config.watch.hang_seconds, self._hangs):
            with self.profiler.step(self.step + 1):
                self.state, figures = self._compiled(self.state, self.run.frozen, batch)
            # Figures are read one step late, so that the device never waits for the host.
            self._settle()
            self.step += 1
            self._pending = figures
            if self.config.watch.rolls_back:
                # No step may begin before it is known whether this one is undone.
                self._settle()

    def _idle(self) -> bool:
        newest: Any = self._pending
        return newest is None or newest.loss.is_ready()

    def _source(self) -> str:
        return getattr(self.run.batches, "source_name", None) or ", ".join(self.run.config.data.sources)

    def _settle(self) -> None:
        """Waits for the newest step, and looks at its figures."""
        if self._pending is None:
            return
        figures, self._pending = jax.device_get(self._pending), None
        trouble = self.troubles.look(self.step, figures)
        self.progress.advance()
        self.meter.advance()
        with self.clock.paused():
            if self.profiler.done(self.step):
                self.progress.note(f"step {self.step}: {self.profiler.how_to_look}")
        if self.step % self.config.log_every == 0 or self.step == self.config.steps:
            self._log(figures)
        if trouble is not None:
            self._roll_back(trouble)

    def _log(self, figures: Figures) -> None:
        counts = figures.verdict.counts
        logged = {
            "loss": float(figures.loss),
            "learning_rate": float(figures.learning_rate),
            "grad_norm": float(figures.grad_norm),
            "spikes": int(counts.spikes),
            "left_out": int(counts.left_out),
            "roll_backs": int(counts.roll_backs),
            **self.meter.lap(self.step),
            **self.run.objective.figures(figures.sums),
        }
        self.trackers.log(self.step, logged)
        self.progress.show(self.step, logged)

    def _roll_back(self, trouble: str) -> None:
        counts = jax.device_get(self.state.watch.counts)
        strike = self.troubles.strike(counts.strikes)
        with self.clock.paused():
            found = roll_back(self.checkpoints, self.state, self.step, self.config.watch.margin, self.run.about)
        if found is None:
            self.progress.note(f"step {self.step}: {trouble}; no checkpoint yet: its update is left out{strike}")
            return
        self.state, undone = found.state, f"{found.to + 1} to {self.step}"
        self._validation = None
        self.trackers.log(self.step, {"rolled_back_to": found.to, "undone_from": found.to + 1, "undone_to": self.step})
        self._save()
        self.progress.note(
            f"step {self.step}: {trouble}; rolled back to {self.checkpoints.path(found.to)}: the updates of batches "
            f"{undone} are undone, and training goes on with the data after them{strike}"
        )

    def _validation_due(self) -> bool:
        return self.step % self.config.evaluate_every == 0 or self.step == self.config.steps

    def _evaluate(self) -> None:
        """Validates, if that has not been done at this step."""
        if self._validation is not None and self._validation[0] == self.step:
            return
        self._settle()
        with self.clock.paused():
            batches = map(self.run.placement.batch, self.run.validation)
            sums = total(lambda batch: self._sums(self.state.params, self.run.frozen, batch), batches)
        means = sums.loss / np.maximum(sums.tokens, 1)
        figures = {"loss": float(np.dot(self.run.objective.coefficients, means)), **self.run.objective.figures(sums)}
        self._validation = (self.step, figures["loss"])
        self.trackers.log(self.step, {f"validation_{name}": value for name, value in figures.items()})
        shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self.progress.note(f"step {self.step}: validation: {shown}")

    def _save(self) -> None:
        self._settle()
        position = merged_positions(everyones(self.run.batches.get_state()))
        loss = self._validation[1] if self._validation is not None and self._validation[0] == self.step else None
        self.checkpoints.save(self.step, self.state, position, self.run.about, loss)

    def _report(self) -> None:
        text = self.run.objective.report(self.state.params, self.run.frozen, self.run.validation, self.run.folder)
        if text is not None:
            print(text)
        self.checkpoints.wait()
        if self.config.plot and jax.process_index() == 0:
            draw_at_end(self.run.folder, self.progress.note)
        self.progress.note(f"step {self.step}: finished; saved {self.run.folder}")

    def _stopped(self, by: signal.Signals) -> Outcome:
        self.checkpoints.wait()
        self.progress.note(
            f"step {self.step}: stopped by {by.name}; saved {self.checkpoints.path(self.step)}; add --resume to go on"
        )
        return Outcome(self.step, by)

    def _last_good(self) -> str:
        self.checkpoints.wait()
        return self.checkpoints.last_good()

    def _hangs(self) -> None:
        limit = self.config.watch.hang_seconds
        self.progress.alarm(
            f"nothing has happened for {limit:g} s near step {self.step}; the program is here:\n{main_stack()}"
        )
