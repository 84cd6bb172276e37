"""The response to loss spikes and to losses that are no longer numbers: ignore, skip, roll back or stop."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lin_jax.errors import UserError
from lin_jax.training.checkpoint.rollback import RollBack
from lin_jax.training.hooks import Hook, Training
from lin_jax.training.monitoring.spike_detection import LossSpikesConfig, StepHealth
from lin_jax.training.train_step import StepMetrics


class SpikeResponse(Hook):
    """Checks every step's health, in order.

    Args:
        config: what to do.
        last_good: names the last good checkpoint, for messages.
        roll_back: from the trainer, a state to go on with, and the step that its weights are from; None if there is no
            checkpoint to go back to.
    """

    def __init__(
        self,
        config: LossSpikesConfig,
        last_good: Callable[[], str] = lambda: "none",
        roll_back: Callable[[Training], RollBack | None] = lambda training: None,
    ) -> None:
        self._config = config
        self._last_good = last_good
        self._roll_back = roll_back
        self._jumping = False
        self._trouble: str | None = None

    def on_step(self, training: Training, metrics: StepMetrics) -> None:
        """Looks at a step's health.

        Raises:
            UserError: the run must stop.
        """
        self._trouble = self._check(training, metrics)

    def after_step(self, training: Training) -> None:
        """Rolls back, if the newest step asks for it."""
        if self._trouble is None:
            return
        trouble, self._trouble = self._trouble, None
        strike = self._strike(jax.device_get(training.state.history.counts).strikes)
        with training.paused():
            found = self._roll_back(training)
        if found is None:
            training.note(f"step {training.step}: {trouble}; no checkpoint yet: its update is left out{strike}")
            return
        training.state, undone = found.state, f"{found.to + 1} to {training.step}"
        training.forget_validation()
        training.record({"rolled_back_to": found.to, "undone_from": found.to + 1, "undone_to": training.step})
        training.save()
        training.note(
            f"step {training.step}: {trouble}; rolled back to {found.name}: the updates of batches {undone} are "
            f"undone, and training goes on with the data after them{strike}"
        )

    def _check(self, training: Training, metrics: StepMetrics) -> str | None:
        """Names the trouble of a step that the run must roll back for; None for others, which are noted if need be."""
        health = metrics.health
        jumped, self._jumping = bool(health.spike) and not self._jumping, bool(health.spike)
        trouble = describe_trouble(metrics)
        if trouble is None or self._answer(health) == "ignore":
            # A plateau of high losses is one thing to report, not one a step.
            if trouble is not None and jumped:
                training.note(f"step {training.step}: {trouble}; left alone, as training.loss_spikes.on_spike says")
            return None
        if self._answer(health) == "stop":
            raise UserError(self._stopped(training.step, trouble))
        if health.counts.strikes > self._config.patience:
            raise UserError(self._exhausted(training.step, trouble))
        if self._answer(health) == "roll_back":
            return trouble
        training.note(f"step {training.step}: {trouble}; its update is left out{self._strike(health.counts.strikes)}")
        return None

    def _strike(self, strikes: Any) -> str:
        """Tells how far patience has been used up, in brackets."""
        return f" (trouble {int(strikes)}, {self._config.patience} are borne)"

    def _answer(self, health: StepHealth) -> str:
        return self._config.on_spike if health.finite else self._config.on_nan

    def _stopped(self, step: int, trouble: str) -> str:
        return (
            f"{trouble} at step {step}; the last good checkpoint is {self._last_good()}; lower optimizer.learning_rate "
            "or optimizer.max_grad_norm and go on from it with --resume"
        )

    def _exhausted(self, step: int, trouble: str) -> str:
        config = self._config
        return (
            f"{trouble} at step {step}, and training.loss_spikes.patience {config.patience} is used up by troubles "
            f"less than {config.window} steps apart; the last good checkpoint is {self._last_good()}; lower "
            "optimizer.learning_rate, look at the data, or raise the patience, and go on with --resume"
        )


def describe_trouble(metrics: StepMetrics) -> str | None:
    """Names what is wrong with a step; None if nothing is."""
    health = metrics.health
    if not health.finite:
        if not np.isfinite(metrics.loss):
            return f"the loss became {metrics.loss}"
        return f"the gradient's norm became {metrics.grad_norm}"
    if not health.spike:
        return None
    if metrics.loss > health.loss_limit:
        return f"the loss jumped to {metrics.loss:.4g} (up to {health.loss_limit:.4g} is ordinary)"
    return f"the gradient's norm jumped to {metrics.grad_norm:.4g} (up to {health.norm_limit:.4g} is ordinary)"
