"""Trained models and heads from their run folders: for decoding, evaluation, export, and runs that build on them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lin_jax.errors import UserError
from lin_jax.hub.files import is_checkpoint_folder
from lin_jax.hub.pretrained import from_pretrained
from lin_jax.models import CausalModel, MedusaHeads, PathHead
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
from lin_jax.training.objectives import OBJECTIVES, Objective, Partly, keeps_base, objective_of
from lin_jax.training.parameters import Params, fingerprint, params_of
from lin_jax.training.processes import agreed
from lin_jax.which_step import Step


def load_model(run_folder: str | Path, step: Step = None) -> tuple[Any, RunConfig, int]:
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
    model, _, found = _read_parts(run, config, step)
    return model, config, found


def load_heads(
    run_folder: str | Path, step: Step = None, *, model: CausalModel | None = None
) -> MedusaHeads | PathHead:
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
    if model is not None and not kind.has_model:
        base = read_base(run)
        _demand_same(model, base.fingerprint, run, f"step {base.step} of {base.folder}")
    own, heads, found = _read_parts(run, config, step)
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


def _demand_same(model: CausalModel, expected: str, run: Path, owner: str) -> None:
    if fingerprint(params_of(model)) != expected:
        raise UserError(
            f"the heads in {run} belong to {owner}, and this is another model; "
            "load that one, or train heads on this one"
        )


@dataclass(frozen=True)
class BaseRun:
    """The frozen model that a run stands on: where it is, the step of its checkpoint, its values' fingerprint."""

    folder: Path
    step: int
    fingerprint: str


def read_base(run_folder: str | Path, step: int | None = None) -> BaseRun:
    """Which frozen model a run's heads, or what else learns in it, stand on; at a step, None is the newest.

    Raises:
        UserError: the run has no checkpoint, or nothing in it stands on a frozen model.
    """
    run = Path(run_folder)
    about = (
        newest_readable(run, lambda each: read_about(run, each), ABOUT_PART)[0]
        if step is None
        else read_about(run, step)
    )
    base = about.base
    if base is None:
        raise UserError(f"{run} holds nothing that stands on a frozen model, and so stands on no other run")
    return BaseRun(Path(os.path.normpath(run / base["run"])), base["step"], base["fingerprint"])


def load_adapters(run_folder: str | Path, step: Step = None) -> tuple[Any, Path]:
    """The model of a run with its adapters on it, not merged, and where the model is that they stand on.

    Raises:
        UserError: there is no such run or checkpoint, or it holds no adapters.
    """
    run = Path(run_folder)
    config = load_run_config(run)
    if config.adapters is None:
        raise UserError(f"{run} holds no adapters; leave --adapters out, or train some with 'adapters'")
    objective = objective_of(config)
    params, found = _read(run, step, objective.shapes())
    assert isinstance(objective, Partly), "as a run with adapters has"
    return objective.unmerged(params, _read_frozen(run, config, objective, found))[0], read_base(run, found).folder


def load_any(
    place: str | Path,
    step: int | None = None,
    *,
    head: str | None = None,
    types: Mapping[str, Any] | None = None,
    shardings: Any = None,
) -> tuple[Any, int]:
    """The model of a run folder, a Hugging Face folder or a file of llama2.c, and the step it is from (0 if none).

    Args:
        place: the folder or file.
        step: which checkpoint of a run; None takes the newest that can be read.
        head: what the model is for, if it is not of a run; None is what the folder says.
        types: `dtype` and `param_dtype` for a model that is not of a run.
        shardings: where the variables of a model that is not of a run lie, as in `hub.from_pretrained`.

    Raises:
        UserError: there is no model.
    """
    if not is_pretrained(place):
        model, _, step = load_model(place, step)
        return model, step
    return from_pretrained(place, head=head, shardings=shardings, **(types or {})), 0


def is_pretrained(place: str | Path) -> bool:
    """Whether a place is a Hugging Face folder or a file of llama2.c, and not a run folder."""
    return Path(place).is_file() or is_checkpoint_folder(Path(place))


def _read_parts(run: Path, config: RunConfig, step: Step) -> tuple[Any, Any, int]:
    """The model and the heads of a run, each None if it has none that learns, and the step they are from."""
    objective = objective_of(config)
    params, found = _read(run, step, objective.shapes())
    frozen: Params = {}
    if OBJECTIVES[config.objective].has_model and keeps_base(config):
        frozen = _read_frozen(run, config, objective, found)
    return *objective.parts(params, frozen), found


def _read_frozen(run: Path, config: RunConfig, objective: Objective, step: int) -> Params:
    base = read_base(run, step)
    model, _ = load_any(base.folder, base.step, types=base_types(config))
    frozen = objective.frozen(model)
    if fingerprint(frozen) != base.fingerprint:
        raise UserError(
            f"what learnt in {run} stands on step {base.step} of {base.folder}, and that is another model by now; "
            "put the old one back"
        )
    return frozen


def base_types(config: RunConfig) -> dict[str, str]:
    """The types that a run's model has, whatever those of a checkpoint are that it starts from."""
    return {name: getattr(config.model, name) for name in ("dtype", "param_dtype")}


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
