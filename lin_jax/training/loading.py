"""Trained models and heads from their run folders: for decoding, evaluation, export, and runs that build on them."""

import os
from dataclasses import dataclass
from pathlib import Path

from lin_jax.errors import UserError
from lin_jax.models import Llama, MedusaHeads, PathHead
from lin_jax.training.checkpoint_files import (
    ABOUT_PART,
    MODEL_PARTS,
    best_first,
    checkpoint_folder,
    first_readable,
    newest_readable,
    problem,
    read_about,
    read_params,
    saved_steps,
)
from lin_jax.training.config import CONFIG_FILE, RunConfig, load_run_config
from lin_jax.training.objectives import OBJECTIVES
from lin_jax.training.parameters import Params, fingerprint, params_of
from lin_jax.training.processes import agreed
from lin_jax.which_step import Step


def load_model(run_folder: str | Path, step: Step = None) -> tuple[Llama, RunConfig, int]:
    """The model of a run, the run's configuration, and the step it is from.

    Args:
        run_folder: output of a train.py run.
        step: which checkpoint; None takes the newest that is whole, "best" the one with the lowest validation loss.

    Raises:
        UserError: there is no such run or checkpoint, it is damaged, or the run holds heads, not a model.
    """
    run = Path(run_folder)
    config = load_run_config(run)
    kind = OBJECTIVES[config.objective]
    if not kind.has_model:
        raise UserError(f"{run} holds {kind.heads_name}, not a model; its model is in {read_base(run).folder}")
    objective = kind.of(config)
    params, found = _read(run, step, objective.shapes())
    return objective.parts(params)[0], config, found


def load_heads(run_folder: str | Path, step: Step = None, *, model: Llama | None = None) -> MedusaHeads | PathHead:
    """The draft heads of a run.

    Args:
        run_folder: output of a train.py run with the objective medusa, medusa_joint or path.
        step: which checkpoint; None takes the newest that is whole, "best" the one with the lowest validation loss.
        model: what the heads are to be used with, to make sure that they were trained on it.

    Raises:
        UserError: the run holds no heads or no such checkpoint, or the heads were trained on another model.
    """
    run = Path(run_folder)
    config = load_run_config(run)
    kind = OBJECTIVES[config.objective]
    if kind.heads_name is None:
        raise UserError(f"{run} holds no draft heads; train some with objective medusa or path and init_from {run}")
    objective = kind.of(config)
    if model is not None and not kind.has_model:
        base = read_base(run)
        _demand_same(model, base.fingerprint, run, f"step {base.step} of {base.folder}")
    params, found = _read(run, step, objective.shapes())
    own, heads = objective.parts(params)
    if model is not None and own is not None:
        _demand_same(model, fingerprint(params_of(own)), run, f"the model beside them at step {found}")
    return heads


def holds_heads(folder: str | Path) -> bool:
    """Whether a folder is that of a run whose model was trained together with draft heads."""
    folder = Path(folder)
    if not (folder / CONFIG_FILE).exists():
        return False
    kind = OBJECTIVES[load_run_config(folder).objective]
    return kind.has_model and kind.heads_name is not None


def _demand_same(model: Llama, expected: str, run: Path, owner: str) -> None:
    if fingerprint(params_of(model)) != expected:
        raise UserError(
            f"the heads in {run} belong to {owner}, and this is another model; "
            "load that one, or train heads on this one"
        )


@dataclass(frozen=True)
class BaseRun:
    """The model that heads stand on: its run folder, the step of its checkpoint, and what stands for its values."""

    folder: Path
    step: int
    fingerprint: str


def read_base(run_folder: str | Path) -> BaseRun:
    """Which model a run's heads stand on.

    Raises:
        UserError: the run has no checkpoint, or holds no heads on a frozen model.
    """
    run = Path(run_folder)
    base = newest_readable(run, lambda step: read_about(run, step), ABOUT_PART)[0].base
    if base is None:
        raise UserError(f"{run} holds no heads on a frozen model, and so stands on no other run")
    return BaseRun(Path(os.path.normpath(run / base["run"])), base["step"], base["fingerprint"])


def _read(run: Path, step: Step, like: Params) -> tuple[Params, int]:
    steps = agreed(lambda: saved_steps(run))
    if not steps:
        raise UserError(f"there is no checkpoint in {run}; train with train.py first")

    def read(each: int) -> tuple[Params, int]:
        return read_params(run, each, like), each

    if step is None:
        return newest_readable(run, read, MODEL_PARTS)[0]
    if step == "best":
        return first_readable(run, agreed(lambda: best_first(run)), read, MODEL_PARTS, "the next best")[0]
    if step not in steps:
        raise UserError(f"{run} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
    folder = checkpoint_folder(run) / str(step)
    if reason := agreed(lambda: problem(folder, MODEL_PARTS)):
        raise UserError(f"{folder} is damaged: {reason}; {run} has steps {', '.join(map(str, steps))}")
    return read(step)
