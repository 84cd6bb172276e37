"""Runs of a recipe on models in memory: without a folder, or in one that keeps what they wrote."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lin_jax.data import Tokenizer
from lin_jax.errors import UserError
from lin_jax.hub.model_card import is_export
from lin_jax.hub.save import save_pretrained
from lin_jax.models.params import params_fingerprint, params_of
from lin_jax.recipe import Recipe, Text, text_data
from lin_jax.training.checkpoint.files import saved_steps
from lin_jax.training.config import RunConfig
from lin_jax.training.config_file import load_run_config
from lin_jax.training.initialization.base_and_teacher import BaseModel, Teacher
from lin_jax.training.model_source import ModelSource
from lin_jax.training.run import train, train_in_memory
from lin_jax.training.settings.changes import changes_of_finished
from lin_jax.training.setup import resolve_in_memory

log = logging.getLogger(__name__)

_OPTIONS = ("batch_size", "sequence_length", "learning_rate", "seed", "window_dropout")
_BASE = "base"


def recipe_of(model: Any, data: Text, options: dict[str, Any]) -> Recipe:
    """The recipe of a call, from its options.

    Raises:
        UserError: an option is unknown or has a wrong value.
    """
    if unknown := [name for name in options if name not in _OPTIONS]:
        raise UserError(f"option {unknown[0]} is unknown; choose among {', '.join(_OPTIONS)}")
    length = options.pop("sequence_length", None)
    return Recipe(model.config, text_data(data, model.config, length), **options)


def train_model(run: RunConfig, model: Any, tokenizer: Tokenizer, teacher: Any, name: str) -> tuple[Any, bool]:
    """Trains in memory; the model, and True if it was stopped before its last step.

    Args:
        run: the run.
        model: what it begins from.
        tokenizer: of the text.
        teacher: the model to learn from, or None.
        name: in front of the progress bar.
    """
    taught = None if teacher is None else Teacher(teacher, tokenizer, "the teacher")
    resolved = resolve_in_memory(run, BaseModel(model, tokenizer), taught)
    params, outcome = train_in_memory(resolved, name)
    return resolved.objective.parts(params, resolved.frozen)[0], outcome.stopped_by is not None


def train_in_folder(
    place: Path, model: Any, tokenizer: Tokenizer, runs: Sequence[RunConfig], end_tokens: Sequence[int]
) -> Any:
    """Trains in a folder, each run from where the one before ended; what is finished is left alone.

    Raises:
        UserError: the folder was begun from another model, or has gone on for more steps.
        KeyboardInterrupt: after Ctrl-C; the run is saved.
    """
    before = keep_model(place / _BASE, model, tokenizer, end_tokens)
    for run in runs:
        folder = Path(run.output)
        steps = saved_steps(folder)
        if steps and steps[-1] > run.training.steps:
            raise UserError(
                f"{folder} has gone on to step {steps[-1]}, beyond the {run.training.steps} asked for; "
                "give more steps, or another output"
            )
        if not steps or steps[-1] < run.training.steps:
            begun = replace(run, init_from=str(before))
            outcome = train(begun, resume=bool(steps), how_to_go_on="the same call goes on from there")
            if outcome.stopped_by is not None:
                raise KeyboardInterrupt
        else:
            say_changes([run])
        before = folder
    return ModelSource.open(before).model()


def say_changes(runs: Sequence[RunConfig]) -> None:
    """Says what finished runs were made with, where something else is asked for now."""
    for run in runs:
        folder = Path(run.output)
        before = load_run_config(folder)
        for line in changes_of_finished(folder, replace(run, init_from=before.init_from, teacher=before.teacher)):
            log.warning("%s", line)


def keep_model(folder: Path, model: Any, tokenizer: Tokenizer, end_tokens: Sequence[int]) -> Path:
    """Writes a model that runs in the same folder begin from; one that is there must be the same.

    Raises:
        UserError: it is another one.
    """
    if not is_export(folder):
        return save_pretrained(model, folder, tokenizer=tokenizer, end_tokens=end_tokens)
    there = ModelSource.open(folder).model(compute=model.config.compute)
    if params_fingerprint(params_of(there)) != params_fingerprint(params_of(model)):
        raise UserError(f"{folder.parent} was begun from another model; give another output")
    return folder
