"""Going on from the last good checkpoint, past the data that led to trouble.

The step goes on counting batches, so that step n is still batch n, checkpoints and metrics only ever go forward, and
a roll-back is on disk, as the next checkpoint, before anything else happens: what is undone are updates, not steps.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from lin_jax.training.checkpoints import About, Checkpoints, saved_steps
from lin_jax.training.step import TrainState
from lin_jax.training.watch import Counts


@dataclass(frozen=True)
class RollBack:
    """A state to go on with, and the step of the checkpoint that its weights are from."""

    state: TrainState
    to: int


def roll_back(checkpoints: Checkpoints, state: TrainState, step: int, margin: int, about: About) -> RollBack | None:
    """The last good checkpoint's weights, optimiser and memory of losses, at step `step`; None if there is none.

    The given state's memory is given away first, as there is seldom room for two.

    Raises:
        UserError: no checkpoint can be read.
    """
    checkpoints.wait()
    steps = [each for each in saved_steps(checkpoints.folder.parent) if each < step]
    if not steps:
        return None
    # Weights may have gone wrong a little before the loss shows it.
    older = [each for each in steps if each <= step - margin]
    like, counts = _shapes(state), jax.device_get(state.watch.counts)
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    restored = checkpoints.restore_before(older[-1] + 1 if older else step, like, about)
    merged = _merged(counts, restored.state.watch.counts, step, restored.step)
    watch = restored.state.watch._replace(counts=merged)
    return RollBack(replace(restored.state, step=jnp.asarray(step, jnp.int32), watch=watch), restored.step)


def _shapes(state: TrainState) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def _merged(now: Counts, then: Counts, step: int, to: int) -> Counts:
    """Counts go on; beside the updates that were left out before the checkpoint, all since are undone."""
    undone = step - to + int(then.left_out)
    merged = now._replace(left_out=undone, roll_backs=now.roll_backs + 1)
    return Counts(*(jnp.asarray(value, jnp.int32) for value in merged))
