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
from lin_jax.hub.files import is_checkpoint_folder
from lin_jax.hub.pretrained import Pretrained, from_pretrained
from lin_jax.models import Llama
from lin_jax.training.about import About
from lin_jax.training.checkpoint_files import saved_steps
from lin_jax.training.config import CONFIG_FILE, RunConfig, plain
from lin_jax.training.loading import load_model, read_base
from lin_jax.training.objectives import OBJECTIVES, Objective
from lin_jax.training.optimizer import Optimizer, build_optimizer
from lin_jax.training.parameters import Params, fingerprint, params_of, shapes
from lin_jax.training.processes import agreed
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
    config = _with_options_of_base(config)
    _check_precision(config)
    base = _load_base(config, resume)
    kind = OBJECTIVES[config.objective]
    if base is not None and not kind.has_model:
        config = replace(config, model=base.model.config)
    # A stand-in vocabulary: any size shows whether the rest describes a model, and heads that fit it.
    kind.of(replace(config, model=replace(config.model, vocab_size=config.model.vocab_size or 1)))
    tokenizer, train, held_out = _read_text(config, base, resume)
    config = replace(config, model=replace(config.model, vocab_size=_vocabulary(config, tokenizer)))
    training = config.training
    batches = training_batches(train, tokenizer, config.data, batch_size=training.batch_size, seed=training.seed)
    validation = validation_batches(held_out, tokenizer, config.data, batch_size=training.batch_size)
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
        batches=batches,
        validation=[part for batch in validation for part in _parts(batch, training.accumulation)],
        about=about,
    )


def _read_text(config: RunConfig, base: Base | None, resume: bool) -> tuple[Tokenizer, Any, Any]:
    """Tokenizer, training documents and held-out documents.

    The tokenizer is that of the run itself, or of the model it starts from, or a new one.
    """
    train, held_out = split_documents(open_documents(config.data), config.data.validation_fraction)
    if resume:
        tokenizer = Tokenizer.load(Path(config.output) / TOKENIZER_FOLDER)
    elif base is not None:
        tokenizer = Tokenizer.load(base.tokenizer)
    else:
        tokenizer = prepare_tokenizer(config.data, train)
    return tokenizer, train, held_out


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


def _load_base(config: RunConfig, resume: bool) -> Base | None:
    goes_on = OBJECTIVES[config.objective].has_model
    if config.init_from is None or (resume and goes_on):
        return None
    folder = Path(config.init_from)
    if is_checkpoint_folder(folder):
        # Heads stand on the model as it is stored; a model that goes on learning may do so in another type.
        types = {name: getattr(config.model, name) for name in _TYPES} if goes_on else {}
        return Base(folder, folder, 0, _causal_llama(from_pretrained(folder, **types), folder))
    # Heads go on with the very model that they began with, even if its own run has gone on since.
    step = read_base(config.output).step if resume else None
    model, _, step = load_model(folder, step)
    return Base(folder, folder / TOKENIZER_FOLDER, step, model)


def _with_options_of_base(config: RunConfig) -> RunConfig:
    """The configuration with the sizes of the Hugging Face folder that it starts from, if it does.

    Only how tokens are mixed and how the model is computed are the run's own to say.
    """
    if config.init_from is None or not is_checkpoint_folder(Path(config.init_from)):
        return config
    sizes = _causal_llama(Pretrained.open(config.init_from).model, Path(config.init_from)).config
    own = {name: getattr(config.model, name) for name in (*_TYPES, "attention", "remat", "unroll")}
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
