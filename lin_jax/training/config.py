"""A run, described: what to train, on what, how; read from YAML with any field overridden on the command line."""

import re
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

from lin_jax.data.config import DataConfig
from lin_jax.errors import UserError
from lin_jax.models import LlamaConfig
from lin_jax.training.objectives import OBJECTIVES

CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and a cosine after it.

    Attributes:
        learning_rate: peak learning rate.
        warmup_steps: steps of linear warm-up; 0 starts at the peak.
        final_fraction: learning rate of the last step, as a share of the peak.
        weight_decay: decoupled weight decay of matrices; norms, biases, filters and scalars never decay.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the square root of the second moment.
        clip_norm: largest global norm of the gradient; null does not clip.
    """

    learning_rate: float = 1e-3
    warmup_steps: int = 100
    final_fraction: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise UserError(f"optimizer.learning_rate is {self.learning_rate}; give a positive number")
        if self.warmup_steps < 0:
            raise UserError(f"optimizer.warmup_steps is {self.warmup_steps}; give 0 or more steps")
        if not 0 <= self.final_fraction <= 1:
            raise UserError(f"optimizer.final_fraction is {self.final_fraction}; give a share between 0 and 1")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UserError(f"optimizer.clip_norm is {self.clip_norm}; give a positive number, or null not to clip")


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how often.

    Attributes:
        steps: optimiser steps of the whole run.
        batch_size: rows an optimiser step.
        accumulation: parts that a step's rows are taken in, one after another, to save memory; the result is the same.
        seed: of the initial weights and of the order of the data.
        log_every: steps between lines of metrics.
        evaluate_every: steps between validations; there is always one before the first step and one after the last.
        checkpoint_every: steps between checkpoints; there is always one after the last step.
        keep_checkpoints: newest checkpoints that are kept.
        keep_best: checkpoints that are kept besides: those with the lowest validation losses. Only those have one that
            are due together with a validation.
    """

    steps: int = 1000
    batch_size: int = 8
    accumulation: int = 1
    seed: int = 0
    log_every: int = 10
    evaluate_every: int = 200
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    keep_best: int = 1

    def __post_init__(self) -> None:
        for name in (each.name for each in fields(self) if each.name not in ("seed", "keep_best")):
            if getattr(self, name) < 1:
                raise UserError(f"training.{name} is {getattr(self, name)}; give 1 or more")
        if self.keep_best < 0:
            raise UserError(f"training.keep_best is {self.keep_best}; give 0 or more")
        if self.batch_size % self.accumulation:
            raise UserError(
                f"training.batch_size {self.batch_size} is not a multiple of training.accumulation {self.accumulation}"
            )


@dataclass(frozen=True)
class RunConfig:
    """A training run.

    Attributes:
        output: folder of the run: its configuration, tokenizer, checkpoints and metrics.
        objective: what to learn: language_model (the next token), medusa (Medusa heads on a frozen model), path (a
            path head on a frozen model) or medusa_joint (a model and its Medusa heads together).
        init_from: run folder or Hugging Face folder whose model (and tokenizer) to start from; medusa and path put
            their heads on that model. A Hugging Face folder also says what the model is: all but attention, types,
            remat, unroll.
        head_targets: what heads of medusa and path learn to guess: text (its tokens: for text of the model's own) or
            model (what the model would say after each piece of it: for any text).
        medusa_heads: how many Medusa heads, for medusa and medusa_joint.
        medusa_decay: head m (from 0) weighs `medusa_decay^m` in the loss.
        head_coefficient: weight of all heads beside the model in the loss of medusa_joint.
        head_learning_rate_factor: learning rate of the heads of medusa_joint, as a multiple of the model's.
        joint_warmup_steps: first steps of medusa_joint, in which its heads learn and its model does not.
        path_width: width of a path head's state, for path; at most the model's hidden size.
        path_depth: how many steps a path head is unrolled for, the first guessing the token after the next one.
        path_decay: step d (from 0) weighs `path_decay^d` in the loss.
        model: the model; of no effect for medusa and path, which take that of `init_from`.
        data: the text.
        optimizer: the optimiser.
        training: how long and how often.
    """

    output: str
    objective: str = "language_model"
    init_from: str | None = None
    head_targets: str = "text"
    medusa_heads: int = 4
    medusa_decay: float = 0.8
    head_coefficient: float = 0.2
    head_learning_rate_factor: float = 4.0
    joint_warmup_steps: int = 100
    path_width: int = 192
    path_depth: int = 5
    path_decay: float = 0.8
    model: LlamaConfig = field(default_factory=LlamaConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise UserError(f"objective '{self.objective}' is unknown; choose one of {', '.join(sorted(OBJECTIVES))}")
        OBJECTIVES[self.objective].check(self)

    def save(self, path: Path) -> None:
        """Writes the configuration as YAML that `load_run_config` reads."""
        path.write_text(yaml.safe_dump(plain(self), sort_keys=False))


def plain(config: Any) -> dict[str, Any]:
    """A configuration as JSON has it: dictionaries, lists, strings and numbers."""

    def simple(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: simple(each) for name, each in value.items()}
        return [simple(each) for each in value] if isinstance(value, list | tuple) else value

    return simple(asdict(config))


def parse_run_config(argv: Sequence[str]) -> tuple[RunConfig, bool]:
    """The run that a command line describes, and whether it is to be resumed.

    Args:
        argv: `CONFIG.yaml [--resume] [--section.field VALUE ...]`.

    Raises:
        UserError: the file is missing, an option is unknown, or a value is wrong.
        SystemExit: help was asked for.
    """
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        argv.insert(0, "--config")
    parser = _parser()
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the output folder")
    return _parse(parser, argv)


def load_run_config(path: str | Path) -> RunConfig:
    """The configuration of a run folder (with `output` as it is given here), or in a YAML file.

    Raises:
        UserError: there is none, or it is not one that this version understands.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / CONFIG_FILE).exists():
            raise UserError(f"{path} is not a run folder: it holds no {CONFIG_FILE}; give the output of a train.py run")
        return replace(load_run_config(path / CONFIG_FILE), output=str(path))
    return _parse(_parser(), ["--config", str(path)])[0]


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="train.py",
        usage="train.py CONFIG.yaml [--resume] [--section.field VALUE ...]",
        description="Trains a model, or draft heads for one, as a YAML file says; options override the file.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="the YAML file, when it is not the first argument")
    parser.add_class_arguments(RunConfig)
    return parser


def _parse(parser: ArgumentParser, argv: list[str]) -> tuple[RunConfig, bool]:
    try:
        parsed = parser.instantiate(parser.parse_args(argv))
    except ArgumentError as error:
        message = " ".join(re.sub(r"<class '(\w+)'>", r"\1", str(error)).split())
        raise UserError(f"{message}; 'train.py --help' lists every option") from error
    values = {each.name: getattr(parsed, each.name) for each in fields(RunConfig)}
    return RunConfig(**values), getattr(parsed, "resume", False)
