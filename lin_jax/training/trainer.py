"""The trainer: steps, validations and saves in an order that a resumed run repeats exactly."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lin_jax.losses.cross_entropy import Batch, sum_over_batches
from lin_jax.training.config import TrainingConfig
from lin_jax.training.distributed.partitioning import Shardings
from lin_jax.training.distributed.preemption import StopSignal
from lin_jax.training.hooks import Figures, Hook, surrounding
from lin_jax.training.objectives import Objective
from lin_jax.training.train_step import StepMetrics, TrainState


@dataclass(frozen=True)
class Outcome:
    """The end of a run.

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


class Trainer:
    """Trains parameters; reads and writes no files itself, which is for its hooks.

    Args:
        objective: what is trained.
        train_step: the jitted step, from `train_step.make_step`.
        state: where to begin.
        frozen: parameters that are not trained.
        batches: training batches, endless.
        validation: held-out batches, each as large as a microbatch.
        shardings: where all of this lies.
        config: how long and how often.
        hooks: what watches the run, in the order in which it is called.
        step: steps taken so far.
    """

    def __init__(
        self,
        objective: Objective,
        train_step: Any,
        state: TrainState,
        frozen: Any,
        batches: Iterator[Batch],
        validation: Sequence[Batch],
        shardings: Shardings,
        config: TrainingConfig,
        hooks: Sequence[Hook] = (),
        *,
        step: int = 0,
    ) -> None:
        self.objective = objective
        self.state = state
        self.frozen = frozen
        self.batches = batches
        self.validation = validation
        self.shardings = shardings
        self.config = config
        self.hooks = list(hooks)
        self.step = step
        self.steps = config.steps
        self._step = train_step
        self._compiled: Any = None
        self._sums = jax.jit(objective.sums, out_shardings=shardings.whole)
        self._pending: StepMetrics | None = None
        self._validated: tuple[int, float] | None = None

    def run(self, stop: StopSignal | None = None) -> Outcome:
        """Trains until the last step or a signal; either way the state is saved then.

        Raises:
            UserError: a hook ends the run, such as for a loss that is no longer a number.
        """
        stopped_by = None
        while self.step < self.steps and (stopped_by := None if stop is None else stop.poll(self.state)) is None:
            if self.step % self.config.evaluate_every == 0:
                self.evaluate()
            self._train()
            if self.step % self.config.checkpoint_every == 0:
                # Validated first where both are due, so that the checkpoint knows its loss; unless it is urgent.
                if self._validation_due() and (stop is None or stop.signal is None):
                    self.evaluate()
                self.save()
        if stopped_by is not None:
            self.save()
            for hook in self.hooks:
                hook.on_stop(self, stopped_by.name)
            return Outcome(self.step, stopped_by)
        self.evaluate()
        self.save()
        for hook in self.hooks:
            hook.on_end(self)
        return Outcome(self.step)

    def evaluate(self) -> None:
        """Validates, if that has not been done at this step."""
        if self._validated is not None and self._validated[0] == self.step:
            return
        self._settle()
        with self.paused():
            batches = map(self.shardings.batch, self.validation)
            sums = sum_over_batches(lambda batch: self._sums(self.state.params, self.frozen, batch), batches)
        means = sums.loss / np.maximum(sums.tokens, 1)
        loss = float(np.dot(self.objective.coefficients, means))
        self._validated = (self.step, loss)
        figures = {"loss": loss, **self.objective.figures(sums)}
        for hook in self.hooks:
            hook.on_validation(self, figures)

    def save(self) -> None:
        """Waits for the newest step, and has hooks save the state."""
        self._settle()
        known = self._validated is not None and self._validated[0] == self.step
        loss = self._validated[1] if known and self._validated is not None else None
        for hook in self.hooks:
            hook.on_save(self, loss)

    @property
    def idle(self) -> bool:
        """True if the devices have nothing left to do."""
        newest: Any = self._pending
        return newest is None or newest.loss.is_ready()

    def paused(self) -> ExitStack:
        """Surrounds work that is not training."""
        return surrounding(self.hooks, "around_pause", self)

    def note(self, text: str) -> None:
        """Shows a line that stays."""
        for hook in self.hooks:
            hook.on_note(text)

    def alarm(self, text: str) -> None:
        """Shows a line that stays, from any process."""
        for hook in self.hooks:
            hook.on_alarm(text)

    def record(self, figures: Figures) -> None:
        """Hands figures of the present step to every hook."""
        for hook in self.hooks:
            hook.on_log(self, figures)

    def forget_validation(self) -> None:
        """Validates anew before the next save that wants a validation loss."""
        self._validated = None

    def _train(self) -> None:
        with surrounding(self.hooks, "around_input", self):
            rows = next(self.batches)
        batch = self.shardings.local_batch(rows, self.config.batch_size)
        if self._compiled is None:
            self._compiled = self._step.lower(self.state, self.frozen, batch).compile()
            for hook in self.hooks:
                hook.on_compiled(self)
        with surrounding(self.hooks, "around_step", self):
            with surrounding(self.hooks, "around_dispatch", self):
                self.state, metrics = self._compiled(self.state, self.frozen, batch)
            # Metrics are read one step late, so that the device never waits for the host.
            self._settle()
            self.step += 1
            self._pending = metrics
            if self.config.loss_spikes.rolls_back:
                # No step may begin before it is known whether this one is undone.
                self._settle()

    def _settle(self) -> None:
        """Waits for the newest step, and hands its metrics to the hooks."""
        if self._pending is None:
            return
        metrics, self._pending = jax.device_get(self._pending), None
        for hook in self.hooks:
            hook.on_step(self, metrics)
        if self.step % self.config.log_every == 0 or self.step == self.steps:
            self.record(self._logged(metrics))
        for hook in self.hooks:
            hook.after_step(self)

    def _logged(self, metrics: StepMetrics) -> Figures:
        counts = metrics.health.counts
        own = {
            "loss": float(metrics.loss),
            "learning_rate": float(metrics.learning_rate),
            "grad_norm": float(metrics.grad_norm),
            "spikes": int(counts.spikes),
            "left_out": int(counts.left_out),
            "roll_backs": int(counts.roll_backs),
        }
        for hook in self.hooks:
            own |= hook.figures(self)
        return {**own, **self.objective.figures(metrics.sums)}

    def _validation_due(self) -> bool:
        return self.step % self.config.evaluate_every == 0 or self.step == self.steps
