"""Hooks: everything that watches a run, from the progress bar to checkpoints, is in a list that the trainer calls."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Protocol

from lin_jax.training.train_step import StepMetrics, TrainState

Figures = dict[str, Any]


class Training(Protocol):
    """The part of a trainer that hooks may use.

    Attributes:
        state: after the newest step; the device may still be at work on it. A hook may put another one in its place.
        step: steps taken so far.
        steps: of the whole run.
    """

    state: TrainState
    step: int
    steps: int

    @property
    def idle(self) -> bool:
        """True if the devices have nothing left to do."""

    def note(self, text: str) -> None:
        """Shows a line that stays."""

    def alarm(self, text: str) -> None:
        """Shows a line that stays, from any process."""

    def record(self, figures: Figures) -> None:
        """Hands figures of the present step to every hook."""

    def save(self) -> None:
        """Saves, if a hook does."""

    def forget_validation(self) -> None:
        """Validates anew before the next save that wants a validation loss."""

    def paused(self) -> AbstractContextManager[Any]:
        """Surrounds work that is not training."""


class Hook:
    """Watches a run; every method does nothing unless a subclass says otherwise.

    For a step the order is: `around_input`, `around_step`, then, when its metrics have arrived, `on_step`, `figures`
    and `on_log` if it is logged, and `after_step`. Each is called for all hooks in the order of the list.
    """

    def around_input(self, training: Training) -> AbstractContextManager[Any]:
        """Surrounds the wait for a batch."""
        return nullcontext()

    def around_step(self, training: Training) -> AbstractContextManager[Any]:
        """Surrounds a step, numbered `training.step + 1`, and the wait for the metrics of the one before."""
        return nullcontext()

    def around_dispatch(self, training: Training) -> AbstractContextManager[Any]:
        """Surrounds the call of a step's program alone."""
        return nullcontext()

    def around_pause(self, training: Training) -> AbstractContextManager[Any]:
        """Surrounds work that is not training: validation, a roll-back."""
        return nullcontext()

    def on_compiled(self, training: Training) -> None:
        """The step's program is compiled, and its first step about to be taken."""

    def on_step(self, training: Training, metrics: StepMetrics) -> None:
        """A step's metrics have arrived, on the host.

        Raises:
            UserError: the run must stop.
        """

    def figures(self, training: Training) -> Figures:
        """Figures to log beside the step's own."""
        return {}

    def on_log(self, training: Training, figures: Figures) -> None:
        """Figures of the present step are recorded."""

    def after_step(self, training: Training) -> None:
        """A step is logged, if it is to be."""

    def on_validation(self, training: Training, figures: Figures) -> None:
        """A validation is done."""

    def on_save(self, training: Training, validation_loss: float | None) -> None:
        """The state is to be saved; the loss is that of exactly this state, if it is known."""

    def on_note(self, text: str) -> None:
        """A line is to be shown, by the first of several processes."""

    def on_alarm(self, text: str) -> None:
        """A line is to be shown, by whichever process."""

    def on_end(self, training: Training) -> None:
        """The last step is taken and saved."""

    def on_stop(self, training: Training, signal_name: str) -> None:
        """A signal has ended the run early; it is saved."""


def surrounding(hooks: Sequence[Hook], method: str, training: Training) -> ExitStack:
    """Enters one of the `around` contexts of all hooks."""
    stack = ExitStack()
    for hook in hooks:
        stack.enter_context(getattr(hook, method)(training))
    return stack
