"""A run made ready: tokenizer, text, objective and starting point, from a configuration."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lin_jax.data import Tokenizer, TrainingBatches
from lin_jax.data.glue import glue_task
from lin_jax.errors import UserError
from lin_jax.evaluation.targets import Batch
from lin_jax.models.logical_axes import axes_of
from lin_jax.models.registry import family_of_config
from lin_jax.training.about import About
from lin_jax.training.base import Base, load_base, with_options_of_base
from lin_jax.training.checkpoint_files import saved_steps
from lin_jax.training.config import CONFIG_FILE, RunConfig, plain
from lin_jax.training.inputs import read_inputs
from lin_jax.training.mesh import make_mesh
from lin_jax.training.objectives import OBJECTIVES, Objective, has_teacher, initial_key, keeps_base, objective_of
from lin_jax.training.objectives.classification import with_labels
from lin_jax.training.optimizer import Optimizer, build_optimizer
from lin_jax.training.parameters import Params, abstract_model, shapes
from lin_jax.training.placement import Placement
from lin_jax.training.processes import agreed, is_first
from lin_jax.training.step import TrainState, make_step
from lin_jax.training.teacher import TOKENIZER_FOLDER, load_teacher


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
        placement: where all of this lies on the run's mesh.
    """

    config: RunConfig
    objective: Objective
    step: Any
    state: TrainState
    frozen: Params
    batches: TrainingBatches
    validation: Sequence[Batch]
    about: About
    placement: Placement

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.output)


def prepare(config: RunConfig, *, resume: bool) -> Run:
    """Makes a run ready, and writes its configuration and tokenizer to its folder.

    Everything that can be wrong with the configuration is found out before any text is read.

    Raises:
        UserError: something is missing, contradicts something else, or is in the way.
    """
    folder = Path(config.output)
    _check_folder(folder, resume)
    config = _with_labels(with_options_of_base(config))
    _check_precision(config)
    mesh = make_mesh(config.mesh)
    base = load_base(config, resume, _model_placement(config, mesh).parameter)
    if base is not None and not OBJECTIVES[config.objective].has_model:
        config = replace(config, family=family_of_config(base.model.config).name, model=base.model.config)
    _check_length(config)
    # A stand-in vocabulary: any size shows whether the rest describes a model, and heads that fit it.
    placement = placement_of(config, objective_of(replace(config, model=_with_vocabulary(config.model))), mesh)
    training = config.training
    placement.check(training.batch_size, training.accumulation, config.data.sequence_length)
    known = Tokenizer.load(folder / TOKENIZER_FOLDER) if resume else None if base is None else base.tokenizer
    inputs = read_inputs(config, known, placement.rows(training.batch_size))
    return _ready(inputs.config, inputs.tokenizer, inputs.batches, inputs.validation, base, placement, resume)


def _ready(
    config: RunConfig,
    tokenizer: Tokenizer,
    batches: TrainingBatches,
    validation: Sequence[Batch],
    base: Base | None,
    placement: Placement,
    resume: bool,
) -> Run:
    folder, training, model = Path(config.output), config.training, None if base is None else base.model
    objective = objective_of(config)
    frozen = placement.place(objective.frozen(model))
    optimizer = build_optimizer(config.optimizer, training.steps, objective.rates)
    state = _first_state(config, objective, optimizer, base, placement, resume)
    about = About(
        objective=config.objective,
        model=plain(config.model),
        tokenizer=tokenizer.fingerprint,
        parameters=shapes(state.params),
        base=base.reference(folder, frozen) if base is not None and keeps_base(config) else None,
    )
    if has_teacher(config):
        frozen = {**frozen, "teacher": placement.place(load_teacher(config, tokenizer, model))}
    if not resume and is_first():
        _write_folder(folder, config, tokenizer)
    return Run(
        config=config,
        objective=objective,
        step=make_step(objective, optimizer, training.accumulation, training.watch, placement=placement, state=state),
        state=state,
        frozen=frozen,
        batches=batches,
        validation=[part for batch in validation for part in _parts(batch, training.accumulation)],
        about=about,
        placement=placement,
    )


def placement_of(config: RunConfig, objective: Objective, mesh: Mesh) -> Placement:
    """Where all parameters of a run lie, those that learn and those that do not; any vocabulary will do."""
    axes = {path: names for module in objective.modules() for path, names in axes_of(module).items()}
    return Placement.of(mesh, axes, config.model)


def _model_placement(config: RunConfig, mesh: Mesh) -> Placement:
    model = abstract_model(_with_vocabulary(config.model), OBJECTIVES[config.objective].purpose)
    return Placement.of(mesh, axes_of(model), config.model)


def _with_vocabulary(model: Any) -> Any:
    return replace(model, vocab_size=model.vocab_size or 1)


def _first_state(
    config: RunConfig,
    objective: Objective,
    optimizer: Optimizer,
    base: Base | None,
    placement: Placement,
    resume: bool,
) -> TrainState:
    """The state before the first step, or its shapes, to be filled from a checkpoint; either says where it lies."""
    key, _ = jax.random.split(jax.random.key(config.training.seed))
    window = config.training.watch.window

    def new(params: Params) -> TrainState:
        return TrainState.new(params, optimizer, key, window)

    like = jax.eval_shape(new, objective.shapes())
    where = placement.tree(like)
    if resume:
        return jax.tree.map(lambda leaf, place: leaf.update(sharding=place), like, where)
    begin = initial_key(config.training.seed)
    if base is None:
        # Born where they lie: no device ever holds more than its part.
        return jax.jit(lambda key: new(objective.start(key, None)), out_shardings=where)(begin)
    return jax.jit(new, out_shardings=where)(placement.place(objective.start(begin, base.model)))


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
    steps = agreed(lambda: saved_steps(folder))
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


def _with_labels(config: RunConfig) -> RunConfig:
    """The configuration with as many labels as its task has, if it has one."""
    if config.data.task is None:
        return config
    return replace(config, model=with_labels(config.model, glue_task(config.data.task)))
