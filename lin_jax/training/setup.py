"""Resolving a run: its configuration becomes the objects that a trainer works with."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lin_jax.data import Tokenizer, TrainingBatches, load_tokenizer
from lin_jax.errors import UserError
from lin_jax.hub.files import GENERATION_FILE
from lin_jax.losses.cross_entropy import Batch
from lin_jax.models.logical_axes import axes_of
from lin_jax.models.params import Params, abstract_model, params_of, shapes
from lin_jax.models.registry import family_of_config
from lin_jax.training.checkpoint.files import saved_steps
from lin_jax.training.checkpoint.metadata import CheckpointMetadata
from lin_jax.training.config import CONFIG_FILE, RunConfig, plain
from lin_jax.training.distributed.mesh import make_mesh
from lin_jax.training.distributed.multihost import broadcast_from_first, is_first
from lin_jax.training.distributed.partitioning import Shardings
from lin_jax.training.initialization.base_and_teacher import (
    BaseModel,
    Teacher,
    check_base,
    check_teacher,
    load_base,
    load_teacher,
    open_base,
    with_options_of_base,
    with_sizes,
)
from lin_jax.training.initialization.fitted_start import describe, fitted_start
from lin_jax.training.inputs import Inputs, read_inputs
from lin_jax.training.model_source import TOKENIZER_FOLDER
from lin_jax.training.objectives import Objective, PartialTraining, initial_key
from lin_jax.training.objectives.registry import (
    check_run,
    has_teacher,
    heads_layers,
    keeps_base,
    kind_of,
    objective_of,
    task_of,
)
from lin_jax.training.optimizer import Optimizer, build_optimizer
from lin_jax.training.train_step import TrainState, make_step

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResolvedRun:
    """The objects that a trainer works with.

    Attributes:
        config: the configuration with every size filled in.
        objective: what is trained.
        step: the jitted step.
        state: the state before the first step; shapes alone if the run is resumed.
        frozen: parameters that are not trained.
        batches: training batches, from the first.
        validation: held-out batches.
        metadata: what checkpoints of this run say of themselves.
        shardings: where all of this lies on the run's mesh.
        tokenizer: of the run.
        notes: lines to show before the first step.
    """

    config: RunConfig
    objective: Objective
    step: Any
    state: TrainState
    frozen: Params
    batches: TrainingBatches
    validation: Sequence[Batch]
    metadata: CheckpointMetadata
    shardings: Shardings
    tokenizer: Tokenizer
    notes: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.output)


def resolve(config: RunConfig, *, resume: bool) -> ResolvedRun:
    """Reads all that a run needs from the disk, and writes its configuration and tokenizer to its folder.

    Everything that can be wrong with the configuration is found out before any text is read.

    Raises:
        UserError: something is missing, contradicts something else, or is in the way.
    """
    check_run(config)
    folder = Path(config.output)
    _check_folder(folder, resume)
    source = open_base(config, resume=resume)
    config = _with_labels(with_options_of_base(config, source))
    _check_precision(config)
    mesh = make_mesh(config.mesh)
    base = load_base(config, source, resume, _model_shardings(config, mesh).parameter)
    config, shardings = _laid_out(config, base, mesh)
    known = load_tokenizer(folder / TOKENIZER_FOLDER) if resume else None if base is None else base.tokenizer
    inputs = read_inputs(config, known, shardings.rows(config.training.batch_size))
    teacher = load_teacher(inputs.config, source, base) if has_teacher(config) else None
    run = _assembled(inputs, base, teacher, shardings, resume)
    if not resume and is_first():
        ends = () if base is None or base.source is None else base.source.end_tokens(run.tokenizer)
        _write_folder(folder, run.config, run.tokenizer, ends)
    return run


def resolve_in_memory(config: RunConfig, base: BaseModel, teacher: Teacher | None = None) -> ResolvedRun:
    """Prepares a run of a model in memory; only the text is read, and nothing is written.

    Args:
        config: the run; its model takes its sizes from the base, and `output` and `init_from` are names for messages.
        base: the model, whose parameters are copied.
        teacher: for attention transfer and distillation.

    Raises:
        UserError: something is missing or contradicts something else.
    """
    check_run(config)
    config = _with_labels(with_sizes(config, base.model.config, "the given model"))
    _check_precision(config)
    check_base(config, base, "the given model")
    config, shardings = _laid_out(config, base, make_mesh(config.mesh))
    inputs = read_inputs(config, base.tokenizer, shardings.rows(config.training.batch_size))
    return _assembled(inputs, base, teacher, shardings, resume=False)


def _laid_out(config: RunConfig, base: BaseModel | None, mesh: Mesh) -> tuple[RunConfig, Shardings]:
    """Finds out where a run lies on its mesh, and refuses sizes that do not fit it."""
    if base is not None and not kind_of(config).trains.has_model:
        config = replace(config, family=family_of_config(base.model.config).name, model=base.model.config)
    if config.objective == "path":
        config = replace(config, heads=replace(config.heads, layers=heads_layers(config)))
    _check_length(config)
    # A stand-in vocabulary: any size shows whether the rest describes a model, and heads that fit it.
    shardings = shardings_of(config, objective_of(replace(config, model=_with_vocabulary(config.model))), mesh)
    training = config.training
    shardings.check(training.batch_size, training.gradient_accumulation, config.data.sequence_length)
    return config, shardings


def _assembled(
    inputs: Inputs, base: BaseModel | None, teacher: Teacher | None, shardings: Shardings, resume: bool
) -> ResolvedRun:
    config, training = inputs.config, inputs.config.training
    objective = objective_of(config)
    frozen = shardings.place(objective.frozen(None if base is None else base.model))
    optimizer = build_optimizer(config.optimizer, training.steps, objective.rates)
    state = _first_state(config, objective, optimizer, base, shardings, resume)
    reference = None
    if base is not None and base.source is not None and keeps_base(config):
        reference = base.source.reference(Path(config.output), frozen)
    _warn_of_coarse_types(config, state.params)
    metadata = CheckpointMetadata(
        objective=config.objective,
        model=plain(config.model),
        tokenizer=inputs.tokenizer.fingerprint,
        parameters=shapes(state.params),
        base=reference,
    )
    notes: tuple[str, ...] = ()
    if teacher is not None:
        check_teacher(config, teacher, inputs.tokenizer, base)
        frozen = {**frozen, "teacher": shardings.place(teacher.model)}
        if not resume and isinstance(objective, PartialTraining) and _fits_memory(config):
            state, notes = _fitted(config, objective, state, frozen, inputs.batches, shardings)
    count, spikes = training.gradient_accumulation, training.loss_spikes
    return ResolvedRun(
        config=config,
        objective=objective,
        step=make_step(objective, optimizer, count, spikes, shardings=shardings, state=state),
        state=state,
        frozen=frozen,
        batches=inputs.batches,
        validation=[part for batch in inputs.validation for part in _microbatches(batch, count)],
        metadata=metadata,
        shardings=shardings,
        tokenizer=inputs.tokenizer,
        notes=notes,
    )


def shardings_of(config: RunConfig, objective: Objective, mesh: Mesh) -> Shardings:
    """Shardings of all parameters of a run, trained or not; any vocabulary will do."""
    axes = {path: names for module in objective.modules() for path, names in axes_of(module).items()}
    return Shardings.of(mesh, axes, config.model)


def _model_shardings(config: RunConfig, mesh: Mesh) -> Shardings:
    model = abstract_model(_with_vocabulary(config.model), kind_of(config).purpose)
    return Shardings.of(mesh, axes_of(model), config.model)


def _with_vocabulary(model: Any) -> Any:
    return replace(model, vocab_size=model.vocab_size or 1)


def _first_state(
    config: RunConfig,
    objective: Objective,
    optimizer: Optimizer,
    base: BaseModel | None,
    shardings: Shardings,
    resume: bool,
) -> TrainState:
    """Makes the state before the first step, or its shapes, to be filled from a checkpoint; placed either way."""
    key, _ = jax.random.split(jax.random.key(config.training.seed))
    window = config.training.loss_spikes.window

    def new(params: Params) -> TrainState:
        return TrainState.new(params, optimizer, key, window)

    like = jax.eval_shape(new, objective.shapes())
    where = shardings.tree(like)
    if resume:
        return jax.tree.map(lambda leaf, place: leaf.update(sharding=place), like, where)
    begin = initial_key(config.training.seed)
    if base is None:
        # Born where they lie: no device ever holds more than its part.
        return jax.jit(lambda key: new(objective.start(key, None)), out_shardings=where)(begin)
    params = objective.start(begin, base.model)
    if base.source is None:
        # The step donates its state; a model in memory goes on living.
        params = jax.tree.map(lambda leaf: leaf.copy(), params)
    return jax.jit(new, out_shardings=where)(shardings.place(params))


def _fits_memory(config: RunConfig) -> bool:
    """True where memories are trained, and may start as the teacher would have them."""
    mixers = config.transfer.learns if config.adapters is None else config.adapters.modules_to_save
    return config.objective == "attention_transfer" and config.transfer.fit_memory and "mixer" in mixers


def _fitted(
    config: RunConfig,
    objective: PartialTraining,
    state: TrainState,
    frozen: Params,
    batches: TrainingBatches,
    shardings: Shardings,
) -> tuple[TrainState, tuple[str, ...]]:
    """The state before the first step with memories that are fitted to the teacher, from the first batch; and notes."""
    begin = batches.get_state()
    batch = shardings.local_batch(next(batches), config.training.batch_size)
    batches.set_state(begin)
    with jax.set_mesh(shardings.mesh):
        student, _ = objective.unmerged(state.params, frozen)
        transfer, seed = config.transfer, config.training.seed
        found = fitted_start(student, frozen["teacher"], batch, transfer.layers, seed, transfer.context_length)
        if not found.shares:
            return state, ()
        place = jax.jit(lambda params: params, out_shardings=shardings.tree(state.params))
        params = place(objective.chosen(params_of(found.model)))
        return replace(state, params=params), (describe(found.shares),)


def _write_folder(folder: Path, config: RunConfig, tokenizer: Tokenizer, end_tokens: Sequence[int]) -> None:
    """Writes settings and tokenizer, and beside that the end tokens of the model that the run begins from."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(folder / TOKENIZER_FOLDER)
        if end_tokens:
            content = json.dumps({"eos_token_id": list(end_tokens)})
            (folder / TOKENIZER_FOLDER / GENERATION_FILE).write_text(content + "\n", encoding="utf-8")
        config.save(folder / CONFIG_FILE)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; give another --output") from error


def _microbatches(batch: Batch, count: int) -> list[Batch]:
    """Cuts a batch into as many microbatches as a step takes it in: what a machine has memory for."""
    columns = {name: np.split(rows, count) for name, rows in batch.items()}
    return [{name: parts[index] for name, parts in columns.items()} for index in range(count)]


def _check_folder(folder: Path, resume: bool) -> None:
    steps = broadcast_from_first(lambda: saved_steps(folder))
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


def _warn_of_coarse_types(config: RunConfig, params: Params) -> None:
    """Says that small updates of bfloat16 parameters are lost: half the distance to the next number rounds away."""
    kinds = {jnp.dtype(leaf.dtype) for leaf in jax.tree.leaves(params)}
    for kind in sorted(kinds & {jnp.dtype("bfloat16"), jnp.dtype("float16")}, key=str):
        lost = float(jnp.finfo(kind).eps) / 4
        log.warning(
            "parameters are learnt in %s: a step of the learning rate %.3g is lost on parameters above %.2g; "
            "give model.param_dtype float32, which model.dtype %s computes with as well",
            kind.name,
            config.optimizer.learning_rate,
            config.optimizer.learning_rate / lost,
            kind.name,
        )


def _check_length(config: RunConfig) -> None:
    positions = getattr(config.model, "max_positions", None)
    if positions is not None and config.data.sequence_length > positions:
        raise UserError(
            f"data.sequence_length {config.data.sequence_length} is more than the {positions} of model.max_positions; "
            "lower the one or raise the other"
        )


def _with_labels(config: RunConfig) -> RunConfig:
    """Gives the model as many labels as its task has, if there is one."""
    task, model = task_of(config), cast(Any, config.model)
    return config if task is None else replace(config, model=replace(model, num_labels=task.outputs))
