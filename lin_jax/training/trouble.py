"""What a run does about a step that went wrong, and what it says."""

from collections.abc import Callable
from typing import Any

import numpy as np

from lin_jax.errors import UserError
from lin_jax.training.step import Figures
from lin_jax.training.watch import Verdict, WatchConfig


class Troubles:
    """Looks at every step's verdict, in order.

    Args:
        config: what to do.
        note: says a line.
        last_good: names the last good checkpoint.
    """

    def __init__(self, config: WatchConfig, note: Callable[[str], None], last_good: Callable[[], str]) -> None:
        self._config = config
        self._note = note
        self._last_good = last_good
        self._jumping = False

    def look(self, step: int, figures: Figures) -> str | None:
        """What went wrong at a step, if the run must roll back for it; else None, and if need be a line is said.

        Raises:
            UserError: the run must stop.
        """
        verdict = figures.verdict
        jumped, self._jumping = bool(verdict.spike) and not self._jumping, bool(verdict.spike)
        what = describe(figures)
        if what is None or self._answer(verdict) == "ignore":
            # A plateau of high losses is one thing to say, not one a step.
            if what is not None and jumped:
                self._note(f"step {step}: {what}; left alone, as training.watch.on_spike says")
            return None
        if self._answer(verdict) == "stop":
            raise UserError(self._stopped(step, what))
        if verdict.counts.strikes > self._config.patience:
            raise UserError(self._exhausted(step, what))
        if self._answer(verdict) == "roll_back":
            return what
        self._note(f"step {step}: {what}; its update is left out{self.strike(verdict.counts.strikes)}")
        return None

    def strike(self, strikes: Any) -> str:
        """How far patience has been used up, in brackets."""
        return f" (trouble {int(strikes)}, {self._config.patience} are borne)"

    def _answer(self, verdict: Verdict) -> str:
        return self._config.on_spike if verdict.finite else self._config.on_nan

    def _stopped(self, step: int, what: str) -> str:
        return (
            f"{what} at step {step}; the last good checkpoint is {self._last_good()}; lower optimizer.learning_rate "
            "or optimizer.clip_norm and go on from it with --resume"
        )

    def _exhausted(self, step: int, what: str) -> str:
        config = self._config
        return (
            f"{what} at step {step}, and training.watch.patience {config.patience} is used up by troubles less than "
            f"{config.window} steps apart; the last good checkpoint is {self._last_good()}; lower "
            "optimizer.learning_rate, look at the data, or raise the patience, and go on with --resume"
        )


def describe(figures: Figures) -> str | None:
    """What is wrong with a step; None if nothing is."""
    verdict = figures.verdict
    if not verdict.finite:
        if not np.isfinite(figures.loss):
            return f"the loss became {figures.loss}"
        return f"the gradient's norm became {figures.grad_norm}"
    if not verdict.spike:
        return None
    if figures.loss > verdict.loss_limit:
        return f"the loss jumped to {figures.loss:.4g} (up to {verdict.loss_limit:.4g} is ordinary)"
    return f"the gradient's norm jumped to {figures.grad_norm:.4g} (up to {verdict.norm_limit:.4g} is ordinary)"
