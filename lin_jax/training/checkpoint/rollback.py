"""Going on from the last good checkpoint, past the data that led to trouble.

The step goes on counting batches, so that step n is still batch n, checkpoints and metrics only ever go forward, and
a roll-back is on disk, as the next checkpoint, before anything else happens: what is undone are updates, not steps.

A run that is killed and resumed rolls back as one that never was. A run that was told to stop has the checkpoint that
it stopped with besides, and may go back to that one instead of an older one.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from lin_jax.models.params import put_like
from lin_jax.training.checkpoint.files import saved_steps
from lin_jax.training.checkpoint.manager import Checkpoints
from lin_jax.training.checkpoint.metadata import CheckpointMetadata
from lin_jax.training.distributed.multihost import broadcast_from_first
from lin_jax.training.monitoring.spike_detection import Counts
from lin_jax.training.train_step import TrainState


@dataclass(frozen=True)
class RollBack:
    """A state to go on with, and the step and the name of the checkpoint that its weights are from."""

    state: TrainState
    to: int
    name: str


def roll_back(
    checkpoints: Checkpoints, state: TrainState, step: int, margin: int, metadata: CheckpointMetadata
) -> RollBack | None:
    """The last good checkpoint's weights, optimiser and memory of losses, at step `step`; None if there is none.

    The given state's memory is given away first, as there is seldom room for two.

    Raises:
        UserError: no checkpoint can be read.
    """
    checkpoints.wait()
    steps = [each for each in broadcast_from_first(lambda: saved_steps(checkpoints.run)) if each < step]
    if not steps:
        return None
    # Weights may have gone wrong a little before the loss shows it.
    older = [each for each in steps if each <= step - margin]
    like, counts = _shapes(state), jax.device_get(state.history.counts)
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    restored = checkpoints.restore_before(older[-1] + 1 if older else step, like, metadata)
    then = jax.device_get(restored.state.history.counts)
    # Beside the updates that were left out before the checkpoint, all since are undone.
    counts = counts._replace(left_out=step - restored.step + then.left_out, roll_backs=counts.roll_backs + 1)
    counts = put_like(Counts(*map(np.int32, counts)), like.history.counts)
    history = restored.state.history._replace(counts=counts)
    state = replace(restored.state, step=put_like(np.int32(step), like.step), history=history)
    return RollBack(state, restored.step, str(checkpoints.path(restored.step)))


def _shapes(state: TrainState) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
