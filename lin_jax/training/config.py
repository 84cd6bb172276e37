"""A run, described: what to train, on what, how; read from YAML with any field overridden on the command line."""

import argparse
import re
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

from lin_jax.data.config import DataConfig
from lin_jax.errors import UserError
from lin_jax.models import LlamaConfig, ModelConfig
from lin_jax.models.registry import model_family
from lin_jax.training.adapters import AdapterConfig
from lin_jax.training.launch import Launch
from lin_jax.training.mesh import MeshConfig
from lin_jax.training.objectives import DistillationConfig, TransferConfig, check_objective
from lin_jax.training.profiling import ProfileConfig
from lin_jax.training.watch import WatchConfig
from lin_jax.training.weights_and_biases import WandbConfig

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
        epochs: how often to read the examples of a task, in place of `steps`; validations and checkpoints then come
            once an epoch.
        batch_size: rows an optimiser step.
        accumulation: parts that a step's rows are taken in, one after another, to save memory; the result is the same.
        seed: of the initial weights and of the order of the data.
        log_every: steps between lines of metrics.
        evaluate_every: steps between validations; there is always one before the first step and one after the last.
        checkpoint_every: steps between checkpoints; there is always one after the last step.
        keep_checkpoints: newest checkpoints that are kept.
        plot: whether the run ends with its curves drawn, as `curves.png`.
        watch: what happens when a step goes wrong, the input stalls or the program hangs.
        profile: which steps are traced.
        wandb: where Weights & Biases keeps the figures, beside the run's folder.
        keep_best: checkpoints that are kept besides: those with the lowest validation losses. Only those have one that
            are due together with a validation.
    """

    steps: int = 1000
    epochs: float | None = None
    batch_size: int = 8
    accumulation: int = 1
    seed: int = 0
    log_every: int = 10
    evaluate_every: int = 200
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    keep_best: int = 1
    plot: bool = True
    watch: WatchConfig = field(default_factory=WatchConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        for name in (each.name for each in fields(self) if each.type is int and each.name not in ("seed", "keep_best")):
            if getattr(self, name) < 1:
                raise UserError(f"training.{name} is {getattr(self, name)}; give 1 or more")
        if self.keep_best < 0:
            raise UserError(f"training.keep_best is {self.keep_best}; give 0 or more")
        if self.epochs is not None and not self.epochs > 0:
            raise UserError(f"training.epochs is {self.epochs}; give a positive number, or null to count steps")
        if self.batch_size % self.accumulation:
            raise UserError(
                f"training.batch_size {self.batch_size} is not a multiple of training.accumulation {self.accumulation}"
            )


@dataclass(frozen=True)
class RunConfig:
    """A training run.

    Attributes:
        output: folder of the run: its configuration, tokenizer, checkpoints and metrics.
        objective: what to learn: language_model (the next token), attention_transfer (what a teacher's attention
            says, layer by layer), medusa (Medusa heads on a frozen model), path (a path head on a frozen model),
            medusa_joint (a model and its Medusa heads together) or classification (a task of GLUE, as `data` names it).
        init_from: run folder, Hugging Face folder or file of llama2.c whose model (and tokenizer) to start from; medusa
            and path put their heads on that model. All but a run folder also say what the model is: all but attention,
            types, remat, unroll. A file of llama2.c has its tokenizer in `data.tokenizer`.
        adapters: learn low-rank adapters, and parts of the model, on the frozen model of `init_from`; null learns all.
        teacher: run folder, Hugging Face folder or file of llama2.c with the teacher of attention_transfer and
            distillation; null is what the model was before it got its present attention: the model of `init_from`, or
            what that run began from, and so on.
        transfer: what learns in attention_transfer, and where.
        distillation: a teacher beside the text, for language_model.
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
        family: what kind of model it is: llama, gpt2, t5, bert or flash.
        model: the model, as its family has it; of no effect for medusa and path, which take that of `init_from`.
        data: the text.
        optimizer: the optimiser.
        training: how long and how often.
        mesh: how the devices of all processes are laid out.
    """

    output: str
    objective: str = "language_model"
    init_from: str | None = None
    adapters: AdapterConfig | None = None
    teacher: str | None = None
    transfer: TransferConfig = field(default_factory=TransferConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    head_targets: str = "text"
    medusa_heads: int = 4
    medusa_decay: float = 0.8
    head_coefficient: float = 0.2
    head_learning_rate_factor: float = 4.0
    joint_warmup_steps: int = 100
    path_width: int = 192
    path_depth: int = 5
    path_decay: float = 0.8
    family: str = "llama"
    model: ModelConfig = field(default_factory=LlamaConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        kind = model_family(self.family).config
        if type(self.model) is not kind:
            raise UserError(
                f"family '{self.family}' needs a model of type {kind.__name__}, and this one is a "
                f"{type(self.model).__name__}; give both alike"
            )
        self.data.rows_per_shard(self.training.batch_size)
        check_objective(self)

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


class Command(NamedTuple):
    """What a command line asks for: a run, whether it is to be resumed, and how its processes find each other."""

    config: RunConfig
    resume: bool
    launch: Launch


def parse_run_config(argv: Sequence[str]) -> Command:
    """The run that a command line describes, whether it is to be resumed, and how its processes find each other.

    Args:
        argv: `CONFIG.yaml [--resume] [--launch.option VALUE ...] [--section.field VALUE ...]`.

    Raises:
        UserError: the file is missing, an option is unknown, or a value is wrong.
        SystemExit: help was asked for.
    """
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        argv.insert(0, "--config")
    parser = _parser(_family(argv))
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the output folder")
    parser.add_class_arguments(Launch, "launch")
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
    try:
        content = path.read_bytes()
    except OSError:
        content = b""  # What is wrong is said by the parser itself.
    return _in_file(path, content)


@lru_cache(maxsize=32)
def _in_file(path: Path, _content: bytes) -> RunConfig:
    """The configuration in a file with this content: runs that stand on others read theirs again and again."""
    argv = ["--config", str(path)]
    return _parse(_parser(_family(argv)), argv).config


def _family(argv: Sequence[str]) -> str:
    """The family that a command line, or else its files, names: it decides which options there are."""
    quick = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    quick.add_argument("--config", action="append", default=[])
    quick.add_argument("--family")
    try:
        said, _ = quick.parse_known_args(list(argv))
        contents = [yaml.safe_load(Path(path).read_text(encoding="utf-8")) for path in said.config]
    except (ArgumentError, OSError, ValueError, yaml.YAMLError):
        return RunConfig.family  # What is wrong is said by the parser itself.
    named = [content["family"] for content in contents if isinstance(content, dict) and "family" in content]
    return said.family or str((named or [RunConfig.family])[-1])


def _parser(family: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog="train.py",
        usage="train.py CONFIG.yaml [--resume] [--section.field VALUE ...]",
        description="Trains a model, or draft heads for one, as a YAML file says; options override the file.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="the YAML file, when it is not the first argument")
    parser.add_class_arguments(RunConfig, skip={"model"})
    parser.add_class_arguments(model_family(family).config, "model")
    return parser


def _parse(parser: ArgumentParser, argv: list[str]) -> Command:
    try:
        parsed = parser.instantiate(parser.parse_args(argv))
    except ArgumentError as error:
        message = " ".join(re.sub(r"<class '(\w+)'>", r"\1", str(error)).split())
        raise UserError(f"{message}; 'train.py --help' lists every option") from error
    values = {each.name: getattr(parsed, each.name) for each in fields(RunConfig)}
    return Command(RunConfig(**values), getattr(parsed, "resume", False), getattr(parsed, "launch", Launch()))
