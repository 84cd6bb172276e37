"""A run, described: what to train, on what, how; read from YAML with any field overridden on the command line."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from lin_jax.data.config import DataConfig
from lin_jax.errors import UserError, check_seed
from lin_jax.models import LlamaConfig, ModelConfig
from lin_jax.models.adapters import AdapterConfig
from lin_jax.models.registry import model_family
from lin_jax.training.distributed.mesh import MeshConfig
from lin_jax.training.monitoring.profiler import ProfileConfig
from lin_jax.training.monitoring.spike_detection import LossSpikesConfig
from lin_jax.training.monitoring.wandb import WandbConfig
from lin_jax.training.monitoring.watchdog import MonitoringConfig
from lin_jax.training.objective_configs import DistillationConfig, HeadsConfig, TransferConfig
from lin_jax.training.optimizer import OptimizerConfig

CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class TrainingConfig:
    """Length of the run, its batches, and intervals of logging, validation and checkpoints.

    Attributes:
        steps: optimiser steps of the whole run.
        epochs: how often to read the examples of a task, in place of `steps`; validations and checkpoints then come
            once an epoch.
        batch_size: rows an optimiser step.
        gradient_accumulation: microbatches that a step's rows are taken in, one after another, to save memory; the
            result is the same.
        seed: of the initial weights and of the order of the data.
        log_every: steps between lines of metrics.
        evaluate_every: steps between validations; there is always one before the first step and one after the last.
        checkpoint_every: steps between checkpoints; there is always one after the last step.
        keep_checkpoints: newest checkpoints that are kept.
        plot: whether the run ends with its curves drawn, as `curves.png`.
        loss_spikes: what counts as a loss spike, and what happens then.
        monitoring: waits that are reported while they last.
        profile: which steps are traced.
        wandb: where Weights & Biases keeps the figures, beside the run's folder.
        keep_best: checkpoints that are kept besides: those with the lowest validation losses. Only those have one that
            are due together with a validation.
    """

    steps: int = 1000
    epochs: float | None = None
    batch_size: int = 8
    gradient_accumulation: int = 1
    seed: int = 0
    log_every: int = 10
    evaluate_every: int = 200
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    keep_best: int = 1
    plot: bool = True
    loss_spikes: LossSpikesConfig = field(default_factory=LossSpikesConfig)
    monitoring: MonitoringConfig = field(default_factory=MonitoringConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        for name in (each.name for each in fields(self) if each.type is int and each.name not in ("seed", "keep_best")):
            if getattr(self, name) < 1:
                raise UserError(f"training.{name} is {getattr(self, name)}; give 1 or more")
        check_seed(self.seed, "training.seed")
        if self.keep_best < 0:
            raise UserError(f"training.keep_best is {self.keep_best}; give 0 or more")
        if self.epochs is not None and not self.epochs > 0:
            raise UserError(f"training.epochs is {self.epochs}; give a positive number, or null to count steps")
        if self.batch_size % self.gradient_accumulation:
            raise UserError(
                f"training.batch_size {self.batch_size} is not a multiple of training.gradient_accumulation "
                f"{self.gradient_accumulation}; change one of them"
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
        heads: draft heads, for medusa, medusa_joint and path.
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
    heads: HeadsConfig = field(default_factory=HeadsConfig)
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

    def save(self, path: Path) -> None:
        """Writes the configuration as YAML that `load_run_config` reads; the file appears whole."""
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(yaml.safe_dump(plain(self), sort_keys=False), encoding="utf-8")
        partial.replace(path)


def plain(config: Any) -> dict[str, Any]:
    """A configuration as JSON has it: dictionaries, lists, strings and numbers."""

    def simple(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: simple(each) for name, each in value.items()}
        return [simple(each) for each in value] if isinstance(value, list | tuple) else value

    return simple(asdict(config))
