"""A run made ready: tokenizer, text, objective and starting point, from a configuration."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lin_jax.data import (
    Tokenizer,
    TrainingBatches,
    open_documents,
    prepare_tokenizer,
    split_documents,
    training_batches,
    validation_batches,
)
from lin_jax.errors import UserError
from lin_jax.evaluation.targets import Batch
from lin_jax.hub.pretrained import Pretrained
from lin_jax.models import Llama
from lin_jax.training.checkpoints import About, saved_steps
from lin_jax.training.config import CONFIG_FILE, RunConfig, plain
from lin_jax.training.loading import base_types, is_pretrained, load_any, read_base
from lin_jax.training.objectives import OBJECTIVES, Objective, has_teacher, initial_key, keeps_base, objective_of
from lin_jax.training.optimizer import Optimizer, build_optimizer
from lin_jax.training.parameters import Params, fingerprint, shapes
from lin_jax.training.step import TrainState, make_step
from lin_jax.training.teacher import TOKENIZER_FOLDER, load_teacher, load_tokenizer_of

# What a run says of its model itself, even where a checkpoint says the rest.
OWN_OPTIONS = ("dtype", "param_dtype", "attention", "remat", "unroll")


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
        folder: its run folder or Hugging Face folder, or file of llama2.c.
        tokenizer: its tokenizer.
        step: of its checkpoint; 0 if it is not of a run.
        model: the model.
    """

    folder: Path
    tokenizer: Tokenizer
    step: int
    model: Llama

    def reference(self, run: Path, frozen: Params) -> dict[str, Any]:
        """What checkpoints say of the model under what learns; the path is relative, so that runs move together."""
        path = os.path.relpath(self.folder.absolute(), run.absolute())
        return {"run": path, "step": self.step, "fingerprint": fingerprint(frozen)}


def prepare(config: RunConfig, *, resume: bool) -> Run:
    """Makes a run ready, and writes its configuration and tokenizer to its folder.

    Everything that can be wrong with the configuration is found out before any text is read.

    Raises:
        UserError: something is missing, contradicts something else, or is in the way.
    """
    folder = Path(config.output)
    _check_folder(folder, resume)
    config = with_options_of_base(config)
    _check_precision(config)
    base = _load_base(config, resume)
    kind = OBJECTIVES[config.objective]
    if base is not None and not kind.has_model:
        config = replace(config, model=base.model.config)
    # A stand-in vocabulary: any size shows whether the rest describes a model, and heads that fit it.
    objective_of(replace(config, model=replace(config.model, vocab_size=config.model.vocab_size or 1)))
    tokenizer, train, held_out = _read_text(config, base, resume)
    config = replace(config, model=replace(config.model, vocab_size=_vocabulary(config, tokenizer)))
    training = config.training
    batches = training_batches(train, tokenizer, config.data, batch_size=training.batch_size, seed=training.seed)
    validation = validation_batches(held_out, tokenizer, config.data, batch_size=training.batch_size)
    objective = objective_of(config)
    frozen = objective.frozen(None if base is None else base.model)
    optimizer = build_optimizer(config.optimizer, training.steps, objective.rates)
    state = _first_state(config, objective, optimizer, base, resume)
    about = About(
        objective=config.objective,
        model=plain(config.model),
        tokenizer=tokenizer.fingerprint,
        parameters=shapes(state.params),
        base=base.reference(folder, frozen) if base is not None and keeps_base(config) else None,
    )
    if has_teacher(config):
        frozen = {**frozen, "teacher": load_teacher(config, tokenizer, None if base is None else base.model)}
    if not resume:
        _write_folder(folder, config, tokenizer)
    return Run(
        config=config,
        objective=objective,
        step=make_step(objective, optimizer, training.accumulation),
        state=state,
        frozen=frozen,
        batches=batches,
        validation=[part for batch in validation for part in _parts(batch, training.accumulation)],
        about=about,
    )


def held_out_batches(config: RunConfig) -> list[Batch]:
    """The held-out text of a run that has begun, in batches of its size."""
    tokenizer, _, held_out = _read_text(config, None, resume=True)
    return list(validation_batches(held_out, tokenizer, config.data, batch_size=config.training.batch_size))


def _read_text(config: RunConfig, base: Base | None, resume: bool) -> tuple[Tokenizer, Any, Any]:
    """Tokenizer, training documents and held-out documents.

    The tokenizer is that of the run itself, or of the model it starts from, or a new one.
    """
    train, held_out = split_documents(open_documents(config.data), config.data.validation_fraction)
    if resume:
        tokenizer = Tokenizer.load(Path(config.output) / TOKENIZER_FOLDER)
    elif base is not None:
        tokenizer = base.tokenizer
    else:
        tokenizer = prepare_tokenizer(config.data, train)
    return tokenizer, train, held_out


def _first_state(
    config: RunConfig, objective: Objective, optimizer: Optimizer, base: Base | None, resume: bool
) -> TrainState:
    """The state before the first step, or its shapes, to be filled from a checkpoint."""
    key, _ = jax.random.split(jax.random.key(config.training.seed))
    if resume:
        return jax.eval_shape(lambda params: TrainState.new(params, optimizer, key), objective.shapes())
    return TrainState.new(
        objective.start(initial_key(config.training.seed), None if base is None else base.model), optimizer, key
    )


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


def _load_base(config: RunConfig, resume: bool) -> Base | None:
    if config.init_from is None or (resume and not keeps_base(config)):
        return None
    folder = Path(config.init_from)
    # Heads stand on the model as it is stored; a model that goes on learning may do so in another type.
    types = base_types(config) if OBJECTIVES[config.objective].has_model else {}
    # What stands on a frozen model goes on with the very one that it began with, even if its own run has gone on since.
    model, step = load_any(folder, read_base(config.output).step if resume else None, types=types)
    return Base(folder, load_tokenizer_of(folder, config.data.tokenizer), step, _causal_llama(model, folder))


def with_options_of_base(config: RunConfig) -> RunConfig:
    """The configuration with the sizes of the checkpoint that it starts from, if that is not a run's.

    Only how tokens are mixed and how the model is computed are the run's own to say.
    """
    if config.init_from is None or not is_pretrained(config.init_from):
        return config
    sizes = _causal_llama(Pretrained.open(config.init_from).model, Path(config.init_from)).config
    own = {name: getattr(config.model, name) for name in OWN_OPTIONS}
    return replace(config, model=replace(sizes, **own))


def _causal_llama(model: Any, folder: Path) -> Llama:
    if not isinstance(model, Llama):
        raise UserError(f"init_from {folder} holds a {type(model).__name__}; only LLaMA and its relatives are trained")
    return model


def _vocabulary(config: RunConfig, tokenizer: Tokenizer) -> int:
    size = config.model.vocab_size
    if size is not None and size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size {size} is smaller than the tokenizer's {tokenizer.vocab_size}; leave it out to take that"
        )
    return size or tokenizer.vocab_size
