"""Loops of steps on the device: plain ones, drafted ones, and both in turn where a text repeats what it had before."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lin_jax.decoding.drafting.ngram_lookup import LONGEST_ALERT, MatchWatch
from lin_jax.decoding.engine.loop_state import LoopState, recent_after, with_recent

# Plain steps that the loop takes at least before it returns for a match, and at most where it watches for one.
STEPS_BEFORE_ALERT, MOST_WATCHED = 4, 512
# Plain steps by which limits may be passed: one that is just what a step may lose must permit it however it is rounded.
_ROUNDING = 1e-3

Step: TypeAlias = Callable[[LoopState], LoopState]


class Bounds(NamedTuple):
    """When a loop returns, whatever its steps give.

    Attributes:
        max_steps: largest number of steps.
        waiting: whether prompts wait for a free row: then the first that is free ends the loop, else the last.
    """

    max_steps: Int[Array, ""]
    waiting: Bool[Array, ""]

    def permit(self, state: LoopState, steps: Int[Array, ""]) -> Bool[Array, ""]:
        """True where one more step is to be taken after some."""
        finished = state.finished
        return (steps < self.max_steps) & ~jnp.all(finished) & ~(self.waiting & jnp.any(finished))


class LossLimit(NamedTuple):
    """Limit on what the steps of one call may lose against plain decoding, in plain steps.

    Attributes:
        cost: plain steps that a step costs.
        allowance: plain steps that may be lost; the loop returns before a step that could exceed it.
    """

    cost: Float[Array, ""] | np.float32
    allowance: Float[Array, ""] | np.float32

    def permits(self, lost: Float[Array, ""]) -> Bool[Array, ""]:
        """True where one more step stays within the limit, whatever it gives; to float32's rounding."""
        return lost + self.cost - 1 <= self.allowance + _ROUNDING


class StepCount(NamedTuple):
    """Steps that a loop has taken.

    Attributes:
        taken: all of them.
        drafted: those with drafts.
    """

    taken: Int[Array, ""]
    drafted: Int[Array, ""]


def plain_steps(
    step: Step,
    state: LoopState,
    bounds: Bounds,
    alert: Int[Array, ""] | None = None,
    least: int = STEPS_BEFORE_ALERT,
) -> tuple[LoopState, Int[Array, ""], Bool[Array, ""]]:
    """Takes plain steps until there is something to copy.

    Args:
        step: takes a plain step.
        state: state of the loop.
        bounds: when to return in any case.
        alert: number of last tokens that must occur earlier in the text, as far back as the drafter looks, of half the
            rows that run, or if no prompts wait, of all rows that decide when all is done; at most `MOST_WATCHED` steps
            are taken then. None looks for nothing.
        least: steps to take before that counts.

    Returns:
        The state, the number of steps, and whether there is something to copy.
    """
    recent, written, watch = state.decode_state.recent, state.written, None
    if alert is not None:
        # The output's room bounds the number of tokens to come.
        room = min(state.output.shape[1], MOST_WATCHED)
        bounds = bounds._replace(max_steps=jnp.minimum(bounds.max_steps, room))
        watch = MatchWatch.begin(recent, room, alert <= LONGEST_ALERT)
    # Nobody looks back in plain steps: of many rows, to move the last tokens on at every step would take long.
    begin = jnp.zeros((), jnp.int32), with_recent(state, recent[:, :0]), watch

    def alerted(state: LoopState, watch: MatchWatch | None) -> Bool[Array, ""]:
        if alert is None or watch is None:
            return jnp.zeros((), bool)
        return _is_alerted(state, watch.found >= alert, bounds.waiting)

    def unfinished(carry: tuple[Array, LoopState, MatchWatch | None]) -> Array:
        steps, state, watch = carry
        return bounds.permit(state, steps) & ~(alerted(state, watch) & (steps >= least))

    def body(carry: tuple[Array, LoopState, MatchWatch | None]) -> tuple[Array, LoopState, MatchWatch | None]:
        steps, state, watch = carry
        after = step(state)
        return steps + 1, after, None if watch is None else watch.follow(steps, after.root)

    steps, state, watch = jax.lax.while_loop(unfinished, body, begin)
    state = with_recent(state, recent_after(recent, state.output, written, state.written))
    return state, steps, alerted(state, watch)


def drafted_steps(
    step: Step, state: LoopState, bounds: Bounds, limit: LossLimit | None
) -> tuple[LoopState, Int[Array, ""]]:
    """Takes drafted steps until one more could lose too much.

    Args:
        step: takes a drafted step.
        state: state of the loop.
        bounds: when to return in any case.
        limit: limit on what may be lost, which the first step keeps; None sets none. What steps gain does not pay for
            later ones: the caller is to look at what has changed.

    Returns:
        The state, and the number of steps.
    """
    zero = jnp.zeros((), jnp.int32)

    def unfinished(carry: tuple[Array, LoopState, Array]) -> Array:
        steps, state, lost = carry
        goes_on = bounds.permit(state, steps)
        return goes_on if limit is None else goes_on & ((steps == 0) | limit.permits(lost))

    def body(carry: tuple[Array, LoopState, Array]) -> tuple[Array, LoopState, Array]:
        steps, state, lost = carry
        after = step(state)
        if limit is not None:
            lost = jnp.maximum(lost + limit.cost - _gained(state, after, bounds.waiting), 0).astype(jnp.float32)
        return steps + 1, after, lost

    steps, state, _ = jax.lax.while_loop(unfinished, body, (zero, state, jnp.zeros((), jnp.float32)))
    return state, steps


def copying_steps(
    plain: Step, drafted: Step, state: LoopState, bounds: Bounds, limit: LossLimit, alert: Int[Array, ""]
) -> tuple[LoopState, StepCount]:
    """Takes plain steps until there is something to copy, copies as long as that loses nothing, and so on.

    To change from one to the other costs nothing here. Where the host does it, that takes as long as two or three plain
    steps of a small model.

    Args:
        plain: takes a plain step.
        drafted: takes a step that copies.
        state: state of the loop.
        bounds: when to return.
        limit: cost of a step that copies, and what all of them may lose before there are only plain ones.
        alert: number of last tokens to copy after, as in `plain_steps`.
    """
    zero = jnp.zeros((), jnp.int32)
    never = jnp.asarray(LONGEST_ALERT + 1, jnp.int32)

    def unfinished(carry: tuple[LoopState, StepCount, Array]) -> Array:
        state, count, _ = carry
        return bounds.permit(state, count.taken)

    def body(carry: tuple[LoopState, StepCount, Array]) -> tuple[LoopState, StepCount, Array]:
        state, (taken, copied), lost = carry
        left = bounds._replace(max_steps=bounds.max_steps - taken)
        affordable = jnp.where(limit.permits(lost), alert, never)
        state, steps, alerted = plain_steps(plain, state, left, affordable, least=0)
        # A step that loses ends the copies.
        one = LossLimit(limit.cost, jnp.minimum(limit.cost - 1, limit.allowance - lost))
        left = bounds._replace(max_steps=jnp.where(alerted, left.max_steps - steps, 0))
        after, copies = drafted_steps(drafted, state, left, one)
        lost = jnp.maximum(lost + copies * limit.cost - _gained(state, after, bounds.waiting), 0)
        return after, StepCount(taken + steps + copies, copied + copies), lost.astype(jnp.float32)

    begin = state, StepCount(zero, zero), jnp.zeros((), jnp.float32)
    state, count, _ = jax.lax.while_loop(unfinished, body, begin)
    return state, count


def _is_alerted(state: LoopState, repeats: Bool[Array, " B"], waiting: Bool[Array, ""]) -> Bool[Array, ""]:
    """True where half the rows that run repeat earlier text, or, if no prompts wait, all that have many tokens left."""
    running = ~state.finished
    left = jnp.where(running, state.limit - state.written, 0)
    # Drafts cost two plain steps and more: they gain nothing by rows with less than half as many tokens left.
    longest = running & (2 * left > jnp.max(left))
    half = 2 * jnp.sum(repeats & running) >= jnp.maximum(jnp.sum(running), 1)
    return jnp.where(waiting, half, jnp.all(repeats | ~longest))


def _gained(before: LoopState, after: LoopState, waiting: Bool[Array, ""]) -> Float[Array, ""]:
    """Plain steps that would have brought as much as some steps did.

    Where prompts wait, that is the mean number of tokens; where none do, by how many the row with the most tokens left
    has fewer left: rows that finish early wait for it.
    """
    tokens = after.written - before.written
    mean = jnp.sum(tokens) / jnp.maximum(jnp.sum(tokens > 0), 1)
    most = [jnp.max(jnp.where(each.finished, 0, each.limit - each.written)) for each in (before, after)]
    return jnp.where(waiting, mean, jnp.minimum(most[0] - most[1], jnp.max(tokens)))
