"""Trained models and heads from their run folders: for decoding, evaluation, export, and runs that build on them."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from lin_jax.errors import UserError
from lin_jax.models import Llama, MedusaHeads
from lin_jax.training.checkpoints import About, newest_readable, read_about, read_params, saved_steps
from lin_jax.training.config import RunConfig, load_run_config
from lin_jax.training.parameters import abstract_model, filled, params_of

TOKENIZER_FOLDER = "tokenizer"


def load_model(run_folder: str | Path, step: int | None = None) -> tuple[Llama, RunConfig, int]:
    """The model of a run, the run's configuration, and the step it is from.

    Args:
        run_folder: output of a train.py run.
        step: which checkpoint; None takes the newest that can be read.

    Raises:
        UserError: there is no such run or checkpoint, it is damaged, or the run holds heads, not a model.
    """
    run = Path(run_folder)
    config = load_run_config(run)
    if config.objective == "medusa":
        raise UserError(f"{run} holds Medusa heads, not a model; its model is in {base_run(run)}")
    model = abstract_model(config.model)
    params, step = _read(run, step, lambda step: read_params(run, step, params_of(model)))
    return filled(model, params), config, step


def load_heads(run_folder: str | Path, step: int | None = None, *, base: tuple[RunConfig, int] | None = None) -> MedusaHeads:
    """The Medusa heads of a run.

    Args:
        run_folder: output of a train.py run with the objective medusa.
        step: which checkpoint; None takes the newest that can be read.
        base: configuration and step, from `load_model`, of the model that the heads are to be used with.

    Raises:
        UserError: the run holds no heads or no such checkpoint, or the heads were trained on another model than `base`.
    """
    run = Path(run_folder)
    config = load_run_config(run)
    if config.objective != "medusa":
        raise UserError(f"{run} holds no Medusa heads; train some with objective medusa and init_from {run}")
    size, vocabulary = config.model.hidden_size, config.model.vocab_size
    assert vocabulary is not None, "filled in when the run began"
    heads = nnx.eval_shape(
        lambda: MedusaHeads(config.medusa_heads, size, vocabulary, dtype=jnp.dtype(config.model.param_dtype))
    )
    params, step = _read(run, step, lambda step: read_params(run, step, params_of(heads)))
    saved = read_about(run, step).base
    if base is not None and saved is not None:
        own = read_about(Path(base[0].output), base[1])
        if base_fingerprint(own, base[1]) != saved["fingerprint"]:
            raise UserError(
                f"the heads in {run} belong to step {saved['step']} of {base_run(run)}, not to step {base[1]} of "
                f"{base[0].output}; load that step, or train new heads"
            )
    return filled(heads, params)


def base_run(run_folder: str | Path) -> Path:
    """The run folder of the model that a run's heads stand on."""
    run = Path(run_folder)
    base = read_about(run, _newest(run)).base
    if base is None:
        raise UserError(f"{run} holds no Medusa heads, and so stands on no other run")
    return Path(os.path.normpath(run / base["run"]))


def base_step(run_folder: str | Path) -> int:
    """The step of the base run's checkpoint that a run's heads were trained on."""
    base = read_about(Path(run_folder), _newest(Path(run_folder))).base
    assert base is not None
    return base["step"]


def base_fingerprint(about: About, step: int) -> str:
    """Stands for the model that heads were trained on: its configuration, tokenizer and step."""
    content = json.dumps([about.model, about.parameters, about.tokenizer, step], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
