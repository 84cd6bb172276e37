"""A run made ready: tokenizer, text, objective and starting point, from a configuration."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

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
from lin_jax.models import Llama
from lin_jax.training.checkpoints import About, saved_steps
from lin_jax.training.config import CONFIG_FILE, RunConfig, plain
from lin_jax.training.loading import load_model, read_base
from lin_jax.training.objectives import OBJECTIVES, Objective
from lin_jax.training.optimizer import build_optimizer
from lin_jax.training.parameters import Params, abstract_model, fingerprint, params_of, shapes
from lin_jax.training.step import TrainState, make_step

TOKENIZER_FOLDER = "tokenizer"


@dataclass(frozen=True)
class Run:
    """What the training loop works with.

    Attributes:
        config: the configuration with every size filled in.
        objective: what to learn.
        step: the jitted step.
        state: the state before the first step.
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
    """A trained model to start from: its run folder, step and values."""

    folder: Path
    config: RunConfig
    step: int
    model: Llama

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
    _check_precision(config)
    base = None if config.init_from is None else _load_base(config, resume)
    if base is not None and config.objective == "medusa":
        config = replace(config, model=base.config.model)
    # A stand-in vocabulary: any size shows whether the rest describes a model.
    abstract_model(replace(config.model, vocab_size=config.model.vocab_size or 1))
    documents = open_documents(config.data)
    train, held_out = split_documents(documents, config.data.validation_fraction)
    tokenizer = _tokenizer(config, base, train, folder, resume)
    config = replace(config, model=replace(config.model, vocab_size=_vocabulary(config, tokenizer)))
    validation = validation_batches(held_out, tokenizer, config.data, batch_size=_part(config))
    training = config.training
    batches = training_batches(train, tokenizer, config.data, batch_size=training.batch_size, seed=training.seed)
    objective: Objective = OBJECTIVES[config.objective].of(config)
    key, init_key = jax.random.split(jax.random.key(training.seed))
    params, frozen = objective.start(init_key, None if base is None else base.model)
    optimizer = build_optimizer(config.optimizer, training.steps)
    about = About(
        objective=config.objective,
        model=plain(config.model),
        tokenizer=tokenizer.fingerprint,
        parameters=shapes(params),
        base=base.reference(folder) if base is not None and config.objective == "medusa" else None,
    )
    if not resume:
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(folder / TOKENIZER_FOLDER)
        config.save(folder / CONFIG_FILE)
    return Run(
        config=config,
        objective=objective,
        step=make_step(objective, optimizer, training.accumulation),
        state=TrainState.new(params, optimizer, key),
        frozen=frozen,
        batches=batches,
        validation=validation,
        about=about,
    )


def _part(config: RunConfig) -> int:
    """Rows that are in memory at once."""
    return config.training.batch_size // config.training.accumulation


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


def _load_base(config: RunConfig, resume: bool) -> Base:
    assert config.init_from is not None
    # Heads go on with the very model that they began with, even if its own run has gone on since.
    step = read_base(config.output).step if resume and config.objective == "medusa" else None
    model, base_config, step = load_model(config.init_from, step)
    return Base(Path(config.init_from), base_config, step, model)


def _tokenizer(config: RunConfig, base: Base | None, documents: Any, folder: Path, resume: bool) -> Tokenizer:
    """The tokenizer of the run itself, or of the model it starts from, or a new one."""
    if resume:
        return Tokenizer.load(folder / TOKENIZER_FOLDER)
    if base is not None:
        return Tokenizer.load(base.folder / TOKENIZER_FOLDER)
    return prepare_tokenizer(config.data, documents)


def _vocabulary(config: RunConfig, tokenizer: Tokenizer) -> int:
    size = config.model.vocab_size
    if size is not None and size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size {size} is smaller than the tokenizer's {tokenizer.vocab_size}; leave it out to take that"
        )
    return size or tokenizer.vocab_size
