"""Parameters of a run's checkpoint, and the frozen model that they stand on."""

import os
from dataclasses import dataclass
from pathlib import Path

from lin_jax.errors import UserError
from lin_jax.models.params import Params
from lin_jax.training.checkpoint.files import (
    METADATA_PART,
    MODEL_PARTS,
    best_first,
    checkpoint_folder,
    first_readable,
    newest_readable,
    problem,
    read_metadata,
    read_params,
    saved_steps,
)
from lin_jax.training.checkpoint.selector import CheckpointSelector
from lin_jax.training.distributed.multihost import broadcast_from_first


@dataclass(frozen=True)
class BaseRun:
    """The frozen model that a run stands on.

    Attributes:
        folder: its place.
        step: of its checkpoint.
        fingerprint: stands for its values.
    """

    folder: Path
    step: int
    fingerprint: str


def read_base(run_folder: str | Path, step: int | None = None) -> BaseRun:
    """Reads which frozen model a run's trained parameters stand on; at a step, None is the newest.

    Raises:
        UserError: the run has no checkpoint, or nothing in it stands on a frozen model.
    """
    run = Path(run_folder)
    metadata = (
        newest_readable(run, lambda each: read_metadata(run, each), METADATA_PART)[0]
        if step is None
        else read_metadata(run, step)
    )
    base = metadata.base
    if base is None:
        raise UserError(f"{run} holds nothing that stands on a frozen model, and so stands on no other run")
    return BaseRun(Path(os.path.normpath(run / base["run"])), base["step"], base["fingerprint"])


def read_run_params(run: Path, selector: CheckpointSelector, like: Params) -> tuple[Params, int]:
    """Reads the trained parameters of a checkpoint, shaped and placed like the given ones, and its step.

    Args:
        run: the run's folder.
        selector: the checkpoint; None takes the newest that is whole, "best" the one with the lowest validation loss.
        like: shapes of the parameters.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or it is of another model.
    """
    steps = broadcast_from_first(lambda: saved_steps(run))
    if not steps:
        raise UserError(f"there is no checkpoint in {run}; train with train.py first")

    def read(each: int) -> tuple[Params, int]:
        return read_params(run, each, like), each

    if selector is None:
        return newest_readable(run, read, MODEL_PARTS)[0]
    if selector == "best":
        return first_readable(run, broadcast_from_first(lambda: best_first(run)), read, MODEL_PARTS, "the next best")[0]
    if selector not in steps:
        raise UserError(f"{run} has no checkpoint of step {selector}; it has {', '.join(map(str, steps))}")
    folder = checkpoint_folder(run) / str(selector)
    if reason := broadcast_from_first(lambda: problem(folder, MODEL_PARTS)):
        raise UserError(f"{folder} is damaged: {reason}; {run} has steps {', '.join(map(str, steps))}")
    return read(selector)
