"""Detection of loss spikes: a step's loss and gradient norm against running medians.

Losses are compared with the median of the last ones, in units of their deviation from it; both hold however wild a few
of them were. What is remembered for that is part of the training state, so that a resumed run decides as one that was
never interrupted, and the decision is made inside the compiled step, before the update is.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lin_jax.errors import UserError

ON_NAN = ("stop", "skip", "roll_back")
ON_SPIKE = ("ignore", "skip", "roll_back")

# The standard deviation of a normal distribution, in units of its median absolute deviation.
_NORMAL = 1.4826
# Losses deviate by this share of their median at least: those of a run that hardly changes are no measure.
_LEAST_DEVIATION = 0.01


@dataclass(frozen=True)
class LossSpikesConfig:
    """Loss spikes: what counts as one, and what a run does about it.

    Attributes:
        on_nan: when the loss or the gradient is no longer finite: stop, skip (leave the update out and go on) or
            roll_back (go on with the weights of the last good checkpoint, past the data that led here).
        on_spike: when the loss or the gradient jumps: ignore (only say so), skip or roll_back.
        spike_factor: a loss so many deviations above the median of the last ones is a spike.
        norm_factor: a gradient whose norm is so many times the median of the last ones is a spike.
        window: how many of the last ordinary steps the medians are of; there are no spikes before half of them.
        patience: updates left out, or roll-backs, with fewer than `window` good steps between each and the next; one
            more ends the run.
        margin: a checkpoint so many steps before the trouble, or fewer, is rolled back to only if there is none older.
    """

    on_nan: str = "stop"
    on_spike: str = "ignore"
    spike_factor: float = 6.0
    norm_factor: float = 10.0
    window: int = 64
    patience: int = 3
    margin: int = 10

    def __post_init__(self) -> None:
        for name, choices in (("on_nan", ON_NAN), ("on_spike", ON_SPIKE)):
            if getattr(self, name) not in choices:
                raise UserError(
                    f"training.loss_spikes.{name} is '{getattr(self, name)}'; choose one of {', '.join(choices)}"
                )
        for name, least in (("window", 4), ("patience", 0), ("margin", 0)):
            if getattr(self, name) < least:
                raise UserError(f"training.loss_spikes.{name} is {getattr(self, name)}; give {least} or more")
        for name in ("spike_factor", "norm_factor"):
            if not getattr(self, name) > 0:
                raise UserError(f"training.loss_spikes.{name} is {getattr(self, name)}; give a positive number")

    @property
    def rolls_back(self) -> bool:
        """True if anything makes the run roll back."""
        return "roll_back" in (self.on_nan, self.on_spike)


# A run that stops when the loss is no longer a number, and else lets things be.
DEFAULT_LOSS_SPIKES = LossSpikesConfig()


class Counts(NamedTuple):
    """Counts of spikes and of their consequences in the whole run; integers of JAX, or of Python on the host.

    Attributes:
        spikes: steps whose loss or gradient jumped.
        left_out: updates left out at once, or undone later by a roll-back.
        roll_backs: returns to a checkpoint.
        strikes: troubles with fewer than a window's steps between each and the next.
        last: step of the last trouble; 0 if there was none.
    """

    spikes: Any
    left_out: Any
    roll_backs: Any
    strikes: Any
    last: Any


class LossHistory(NamedTuple):
    """Losses and gradient norms of earlier steps, and counts of spikes.

    Attributes:
        losses: of the last W ordinary steps, oldest first; infinity where there were not so many.
        norms: of their gradients.
        counts: what went wrong.
    """

    losses: Float[Array, " W"]
    norms: Float[Array, " W"]
    counts: Counts

    @classmethod
    def new(cls, window: int) -> "LossHistory":
        """Before the first step."""
        # Each an array of its own: a step reuses the memory of all.
        losses, norms = (jnp.full((window,), jnp.inf, jnp.float32) for _ in range(2))
        return cls(losses, norms, Counts(*(jnp.zeros((), jnp.int32) for _ in Counts._fields)))

    def to_json(self) -> dict[str, Any]:
        """As JSON has it, exactly: every float32 is a float64."""
        losses, norms, counts = jax.device_get(tuple(self))
        known = np.isfinite(losses)
        values = {"losses": losses[known].tolist(), "norms": norms[known].tolist()}
        return {**values, "counts": {name: int(value) for name, value in counts._asdict().items()}}

    @classmethod
    def from_json(cls, saved: dict[str, Any], window: int) -> "LossHistory":
        """Reads what `to_json` gave, perhaps of a run with another window, on the host."""

        def filled(values: list[float]) -> Any:
            last = values[-window:]
            return np.array([*[np.inf] * (window - len(last)), *last], np.float32)

        counts = Counts(**{name: np.int32(value) for name, value in saved["counts"].items()})
        return cls(filled(saved["losses"]), filled(saved["norms"]), counts)


class StepHealth(NamedTuple):
    """Result of checking a step.

    Attributes:
        finite: whether loss and gradient are finite.
        spike: whether they are, and one of them jumped.
        left_out: whether the update is left out.
        loss_limit: largest ordinary loss.
        norm_limit: largest ordinary norm of a gradient.
        counts: what went wrong so far, this step included.
    """

    finite: Bool[Array, ""]
    spike: Bool[Array, ""]
    left_out: Bool[Array, ""]
    loss_limit: Float[Array, ""]
    norm_limit: Float[Array, ""]
    counts: Counts


def check_step(
    config: LossSpikesConfig, history: LossHistory, step: Int[Array, ""], loss: Float[Array, ""], norm: Float[Array, ""]
) -> tuple[StepHealth, LossHistory]:
    """The verdict on a step (from 1), and what is remembered of it."""
    loss, norm = loss.astype(jnp.float32), norm.astype(jnp.float32)
    known = jnp.sum(jnp.isfinite(history.losses))
    middle = median(history.losses, known)
    deviations = jnp.where(jnp.isfinite(history.losses), jnp.abs(history.losses - middle), jnp.inf)
    deviation = jnp.maximum(_NORMAL * median(deviations, known), _LEAST_DEVIATION * jnp.abs(middle))
    enough = known >= config.window // 2
    loss_limit = jnp.where(enough, middle + config.spike_factor * deviation, jnp.inf)
    norm_limit = jnp.where(enough, config.norm_factor * median(history.norms, known), jnp.inf)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    spike = finite & ((loss > loss_limit) | (norm > norm_limit))
    left_out = ~finite if config.on_spike == "ignore" else ~finite | spike
    counts = _counted(config, history.counts, step, spike, left_out)
    return StepHealth(finite, spike, left_out, loss_limit, norm_limit, counts), LossHistory(
        jnp.where(left_out, history.losses, _pushed(history.losses, loss)),
        jnp.where(left_out, history.norms, _pushed(history.norms, norm)),
        counts,
    )


def median(values: Float[Array, " W"], known: Int[Array, ""]) -> Float[Array, ""]:
    """The median of those values that are finite, of which there are `known`; infinity where there are none."""
    ordered = jnp.sort(values)
    return (ordered[jnp.maximum(known - 1, 0) // 2] + ordered[known // 2]) / 2


def _counted(
    config: LossSpikesConfig, counts: Counts, step: Array, spike: Bool[Array, ""], left_out: Bool[Array, ""]
) -> Counts:
    forgiven = step - counts.last > config.window
    strikes = jnp.where(forgiven, 0, counts.strikes) + 1
    return Counts(
        spikes=counts.spikes + spike,
        left_out=counts.left_out + left_out,
        roll_backs=counts.roll_backs,
        strikes=jnp.where(left_out, strikes, counts.strikes),
        last=jnp.where(left_out, step, counts.last),
    )


def _pushed(values: Float[Array, " W"], newest: Float[Array, ""]) -> Float[Array, " W"]:
    return jnp.append(values[1:], newest)
