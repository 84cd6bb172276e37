"""A run made ready: tokenizer, text, objective and starting point, from a configuration."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lin_jax.attention import AttentionConfig
from lin_jax.data import Tokenizer, TrainingBatches
from lin_jax.data.config import HUB_PREFIX
from lin_jax.data.glue import glue_task
from lin_jax.errors import UserError
from lin_jax.evaluation.targets import Batch
from lin_jax.hub.description import family_of
from lin_jax.hub.files import is_checkpoint_folder, read_config, resolve
from lin_jax.hub.pretrained import Pretrained
from lin_jax.models.registry import MODELS, ModelFamily, family_of_config, model_class
from lin_jax.training.checkpoints import About, saved_steps
from lin_jax.training.config import CONFIG_FILE, RunConfig, plain
from lin_jax.training.inputs import read_inputs
from lin_jax.training.loading import load_model, read_base
from lin_jax.training.objectives import OBJECTIVES, Objective
from lin_jax.training.objectives.classification import with_labels
from lin_jax.training.optimizer import Optimizer, build_optimizer
from lin_jax.training.parameters import Params, fingerprint, params_of, shapes
from lin_jax.training.step import TrainState, make_step

TOKENIZER_FOLDER = "tokenizer"
_TYPES = ("dtype", "param_dtype")


@dataclass(frozen=True)
class Run:
    """What the training loop works with.

    Attributes:
        config: the configuration with every size filled in.
        objective: what to learn.
        step: the jitted step.
        state: the state before the first step; shapes alone if the run is resumed.
        frozen: parameters that do not learn.
        batches: training batches, from the first.
        validation: held-out batches.
        about: what checkpoints of this run say of themselves.
    """

    config: RunConfig
    objective: Objective
    step: Any
    state: TrainState
    frozen: Params
    batches: TrainingBatches
    validation: Sequence[Batch]
    about: About

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.output)


@dataclass(frozen=True)
class Base:
    """A trained model to start from.

    Attributes:
        folder: its run folder, or Hugging Face folder.
        tokenizer: folder of its tokenizer.
        step: of its checkpoint; 0 in a Hugging Face folder.
        model: the model.
    """

    folder: Path
    tokenizer: Path
    step: int
    model: Any

    def reference(self, run: Path) -> dict[str, Any]:
        """What heads' checkpoints say of the model under them; the path is relative, so that runs move together."""
        path = os.path.relpath(self.folder.absolute(), run.absolute())
        return {"run": path, "step": self.step, "fingerprint": fingerprint(params_of(self.model))}


def prepare(config: RunConfig, *, resume: bool) -> Run:
    """Makes a run ready, and writes its configuration and tokenizer to its folder.

    Everything that can be wrong with the configuration is found out before any text is read.

    Raises:
        UserError: something is missing, contradicts something else, or is in the way.
    """
    folder = Path(config.output)
    _check_folder(folder, resume)
    config = _with_labels(_with_options_of_base(config))
    _check_precision(config)
    base = _load_base(config, resume)
    kind = OBJECTIVES[config.objective]
    if base is not None and not kind.has_model:
        config = replace(config, family=family_of_config(base.model.config).name, model=base.model.config)
    _check_length(config)
    # A stand-in vocabulary: any size shows whether the rest describes a model, and heads that fit it.
    kind.of(replace(config, model=replace(config.model, vocab_size=config.model.vocab_size or 1)))
    inputs = read_inputs(config, folder / TOKENIZER_FOLDER if resume else None if base is None else base.tokenizer)
    config, tokenizer, training = inputs.config, inputs.tokenizer, inputs.config.training
    objective: Objective = kind.of(config)
    optimizer = build_optimizer(config.optimizer, training.steps, objective.rates)
    state = _first_state(config, objective, optimizer, base, resume)
    about = About(
        objective=config.objective,
        model=plain(config.model),
        tokenizer=tokenizer.fingerprint,
        parameters=shapes(state.params),
        base=base.reference(folder) if base is not None and not kind.has_model else None,
    )
    if not resume:
        _write_folder(folder, config, tokenizer)
    return Run(
        config=config,
        objective=objective,
        step=make_step(objective, optimizer, training.accumulation),
        state=state,
        frozen=objective.frozen(None if base is None else base.model),
        batches=inputs.batches,
        validation=[part for batch in inputs.validation for part in _parts(batch, training.accumulation)],
        about=about,
    )


def _first_state(
    config: RunConfig, objective: Objective, optimizer: Optimizer, base: Base | None, resume: bool
) -> TrainState:
    """The state before the first step, or its shapes, to be filled from a checkpoint."""
    key, init_key = jax.random.split(jax.random.key(config.training.seed))

    if resume:
        return jax.eval_shape(lambda params: TrainState.new(params, optimizer, key), objective.shapes())
    return TrainState.new(objective.start(init_key, None if base is None else base.model), optimizer, key)


def _write_folder(folder: Path, config: RunConfig, tokenizer: Tokenizer) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(folder / TOKENIZER_FOLDER)
        config.save(folder / CONFIG_FILE)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; give another --output") from error


def _parts(batch: Batch, count: int) -> list[Batch]:
    """A batch in as many parts as a step takes it in: what a machine has memory for."""
    columns = {name: np.split(rows, count) for name, rows in batch.items()}
    return [{name: parts[index] for name, parts in columns.items()} for index in range(count)]


def _check_folder(folder: Path, resume: bool) -> None:
    steps = saved_steps(folder)
    if resume and not steps:
        raise UserError(f"there is no checkpoint in {folder} to resume from; leave --resume out to start the run")
    if steps and not resume:
        raise UserError(
            f"{folder} already holds checkpoints up to step {steps[-1]}; add --resume to go on from there, "
            "or give another --output"
        )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output {folder} is a file; give the name of a folder")


def _check_precision(config: RunConfig) -> None:
    if "float64" in (config.model.dtype, config.model.param_dtype) and not jax.config.read("jax_enable_x64"):
        raise UserError("model.dtype float64 needs 64-bit JAX; call jax.config.update('jax_enable_x64', True) first")


def _check_length(config: RunConfig) -> None:
    positions = getattr(config.model, "max_positions", None)
    if positions is not None and config.data.sequence_length > positions:
        raise UserError(
            f"data.sequence_length {config.data.sequence_length} is more than the {positions} of model.max_positions; "
            "lower the one or raise the other"
        )


def _load_base(config: RunConfig, resume: bool) -> Base | None:
    kind = OBJECTIVES[config.objective]
    if config.init_from is None or (resume and kind.has_model):
        return None
    folder = _base_folder(config.init_from)
    if is_checkpoint_folder(folder):
        return Base(folder, folder, 0, _open(config, folder).load(seed=config.training.seed))
    # Heads go on with the very model that they began with, even if its own run has gone on since.
    step = read_base(config.output).step if resume else None
    model, _, step = load_model(folder, step)
    _check_base(config, family_of_config(model.config), folder)
    if not kind.has_model and not isinstance(model, model_class(model.config, kind.purpose)):
        raise UserError(f"init_from {folder} holds a {type(model).__name__}, which heads cannot stand on")
    return Base(folder, folder / TOKENIZER_FOLDER, step, model)


def _base_folder(place: str) -> Path:
    return resolve(place) if place.startswith(HUB_PREFIX) else Path(place)


def _open(config: RunConfig, folder: Path) -> Pretrained:
    """What a run starts from in a Hugging Face folder, as a model that is for what the run is for."""
    kind = OBJECTIVES[config.objective]
    _check_base(config, MODELS[family_of(read_config(folder)).name], folder)
    # Heads stand on the model as it is stored; a model that goes on learning may do so in another type.
    types = {name: getattr(config.model, name) for name in _TYPES} if kind.has_model else {}
    return Pretrained.open(folder, head=kind.purpose, **types)


def _with_labels(config: RunConfig) -> RunConfig:
    """The configuration with as many labels as its task has, if it has one."""
    if config.data.task is None:
        return config
    return replace(config, model=with_labels(config.model, glue_task(config.data.task)))


def _check_base(config: RunConfig, family: ModelFamily, folder: Path) -> None:
    kind = OBJECTIVES[config.objective]
    if kind.has_model and family.name != config.family:
        raise UserError(
            f"init_from {folder} holds a {family.name}, and the family of this run is {config.family}; "
            f"give family {family.name}"
        )
    if kind.purpose not in family.models:
        raise UserError(
            f"init_from {folder} holds a {family.name}, which has no model for {kind.purpose}, as objective "
            f"'{config.objective}' needs; give another folder"
        )


def _with_options_of_base(config: RunConfig) -> RunConfig:
    """The configuration with the sizes of the Hugging Face folder that it starts from, if it does.

    Only how tokens are mixed and how the model is computed are the run's own to say.
    """
    kind = OBJECTIVES[config.objective]
    if config.init_from is None or not is_checkpoint_folder(_base_folder(config.init_from)):
        return config
    sizes = _open(config, _base_folder(config.init_from)).model.config
    if not kind.has_model:
        return replace(config, family=family_of_config(sizes).name, model=sizes)
    mixers = [each.name for each in fields(sizes) if isinstance(getattr(sizes, each.name), AttentionConfig)]
    own = {name: getattr(config.model, name) for name in (*_TYPES, *mixers, "remat", "unroll")}
    return replace(config, model=replace(sizes, **own))
