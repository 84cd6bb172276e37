"""Objectives by name: what each trains, the checks of its options, and how it is built from a run's sections."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lin_jax.data.glue.tasks import Task, glue_task
from lin_jax.errors import UserError
from lin_jax.models.adapters import TrainableFilter
from lin_jax.models.registry import CAUSAL_LM, CLASSIFIER, model_class
from lin_jax.training.config import RunConfig
from lin_jax.training.objective_configs import Trains
from lin_jax.training.objectives.attention_transfer import AttentionTransfer
from lin_jax.training.objectives.classification import Classification
from lin_jax.training.objectives.distillation import Distillation
from lin_jax.training.objectives.draft_vocabulary import tokens_from_text
from lin_jax.training.objectives.medusa import Medusa
from lin_jax.training.objectives.medusa_joint import MedusaJoint
from lin_jax.training.objectives.next_token import NextToken
from lin_jax.training.objectives.objective import Objective
from lin_jax.training.objectives.partial_training import PartialTraining
from lin_jax.training.objectives.path_head import PathHeadObjective

# Tokens ahead that heads draft where a run does not say.
MEDUSA_DEPTH, PATH_DEPTH = 4, 5


@dataclass(frozen=True)
class ObjectiveKind:
    """An objective that a run can name.

    Attributes:
        build: makes it from a run whose model is fully described; raises a `UserError` if that is impossible.
        check: refuses options of a run that do not fit it; None accepts all.
        trains: what it trains.
        purpose: what the trained model, or the model under trained heads, is for, as the registry of models has it.
        heads_name: what messages call its heads; empty without heads.
    """

    build: Callable[[RunConfig], Any]
    check: Callable[[RunConfig], None] | None = None
    trains: Trains = Trains.MODEL
    purpose: str = CAUSAL_LM
    heads_name: str = ""


def _check_heads(config: RunConfig) -> None:
    """Refuses runs without a model to put heads on, or with texts too short for the deepest guess."""
    if config.init_from is None:
        raise UserError(f"objective '{config.objective}' needs init_from: the run folder of the model to put heads on")
    depth = heads_depth(config)
    if config.data.sequence_length <= depth:
        raise UserError(
            f"data.sequence_length {config.data.sequence_length} leaves nothing to predict at the end of heads.depth "
            f"{depth}; give a longer one"
        )


def _check_medusa(config: RunConfig) -> None:
    _check_heads(config)
    for name in ("layers", "self_steps", "vocabulary", "tokens"):
        if value := getattr(config.heads, name):
            shown = list(value) if isinstance(value, tuple) else value
            raise UserError(
                f"heads.{name} {shown} is for objective path, not '{config.objective}'; leave heads.{name} out"
            )


def _check_joint(config: RunConfig) -> None:
    _check_medusa(config)
    if not 0 <= config.heads.warmup_steps < config.training.steps:
        raise UserError(
            f"heads.warmup_steps is {config.heads.warmup_steps}; give 0 or more, and fewer than the "
            f"{config.training.steps} of training.steps, so that the model is trained, too"
        )


def _check_transfer(config: RunConfig) -> None:
    if config.init_from is None:
        raise UserError("objective 'attention_transfer' needs init_from: the model whose attention is replaced")
    chosen = config.transfer.layers
    if chosen is not None and not 0 <= chosen[0] < chosen[1]:
        raise UserError(f"transfer.layers is {list(chosen)}; give the first layer and the one after the last")
    if config.transfer.blocks > 1 and chosen is not None:
        raise UserError(f"transfer.blocks {config.transfer.blocks} and transfer.layers exclude each other; give one")


def _check_classification(config: RunConfig) -> None:
    if config.data.task is None:
        raise UserError("objective 'classification' needs data.task; give one, such as sst2")


def _transfer(config: RunConfig) -> AttentionTransfer:
    model, transfer = config.model, config.transfer
    if (end := (transfer.layers or (0, 1))[1]) > model.num_layers:
        raise UserError(f"transfer.layers ends at {end}, and the model has {model.num_layers} layers; give fewer")
    if transfer.blocks > model.num_layers:
        raise UserError(
            f"transfer.blocks is {transfer.blocks}, and the model has {model.num_layers} layers; give fewer"
        )
    if transfer.blocks > 1:
        raise UserError(
            f"transfer.blocks is {transfer.blocks}, which takes a run for each block; make this a stage of 'stages'"
        )
    return AttentionTransfer(
        model,
        config.adapters,
        layers=transfer.layers,
        progressive=transfer.progressive,
        window_dropout=transfer.window_dropout,
        context_length=transfer.context_length,
        narrowed_window=transfer.narrowed_window,
    )


def _classification(config: RunConfig) -> Classification:
    task = task_of(config)
    assert task is not None, "checked with the configuration"
    model: Any = config.model
    return Classification(replace(model, num_labels=task.outputs), task)


def _next_token(config: RunConfig) -> NextToken:
    if config.distillation.weight:
        return Distillation(config.model, config.adapters, config.distillation)
    return NextToken(config.model, config.adapters)


def _medusa(config: RunConfig) -> Medusa:
    return Medusa(config.model, heads_depth(config), config.heads.decay, config.heads.targets)


def _medusa_joint(config: RunConfig) -> MedusaJoint:
    return MedusaJoint(config.model, heads_depth(config), config.heads, config.adapters)


def _path(config: RunConfig) -> PathHeadObjective:
    heads, model = config.heads, config.model
    return PathHeadObjective(
        model,
        heads.width,
        heads_depth(config),
        heads.decay,
        heads.targets,
        layers=heads_layers(config),
        tokens=None if heads.tokens is None else tokens_from_text(heads.tokens, model.vocab_size or 1),
        self_steps=heads.self_steps,
    )


OBJECTIVES: dict[str, ObjectiveKind] = {
    "attention_transfer": ObjectiveKind(_transfer, _check_transfer),
    "classification": ObjectiveKind(_classification, _check_classification, purpose=CLASSIFIER),
    "language_model": ObjectiveKind(_next_token),
    "medusa": ObjectiveKind(_medusa, _check_medusa, Trains.HEADS, heads_name="Medusa heads"),
    "medusa_joint": ObjectiveKind(_medusa_joint, _check_joint, Trains.MODEL_AND_HEADS, heads_name="Medusa heads"),
    "path": ObjectiveKind(_path, _check_heads, Trains.HEADS, heads_name="a path head"),
}


def heads_depth(config: RunConfig) -> int:
    """Tokens ahead that a run's heads draft."""
    return config.heads.depth or (PATH_DEPTH if config.objective == "path" else MEDUSA_DEPTH)


def heads_layers(config: RunConfig) -> tuple[int, ...]:
    """Layers that a run's path head reads beside the last.

    Raises:
        UserError: there are no such layers, or they are not in order.
    """
    chosen, count = config.heads.layers, config.model.num_layers
    if chosen is None:
        return tuple(sorted({count * quarter // 4 for quarter in (1, 2, 3)} - {count - 1}))
    if list(chosen) != sorted(set(chosen)) or not all(0 <= each < count for each in chosen):
        raise UserError(f"heads.layers is {list(chosen)}; give numbers from 0 to {count - 1}, in ascending order")
    return chosen


def task_of(config: RunConfig) -> Task | None:
    """The task of GLUE that a run reads, if it reads one."""
    return None if config.data.task is None else glue_task(config.data.task)


def kind_of(config: RunConfig) -> ObjectiveKind:
    """The objective that a run names.

    Raises:
        UserError: there is none of that name.
    """
    if config.objective not in OBJECTIVES:
        raise UserError(f"objective '{config.objective}' is unknown; choose one of {', '.join(sorted(OBJECTIVES))}")
    return OBJECTIVES[config.objective]


def check_run(config: RunConfig) -> None:
    """Refuses options of different sections that do not fit each other.

    Raises:
        UserError: they do not.
    """
    kind = kind_of(config)
    if kind.trains.has_model:
        model_class(config.model, kind.purpose)
    if config.data.task is not None and kind.purpose != CLASSIFIER:
        raise UserError(f"data.task is for objective classification, not '{config.objective}'; leave data.task out")
    if config.data.task is None and config.training.epochs is not None:
        raise UserError("training.epochs is for data.task; give training.steps for text")
    if kind.check is not None:
        kind.check(config)
    if config.adapters is not None and not kind.trains.has_model:
        raise UserError(f"adapters are for models, and objective '{config.objective}' trains heads; leave adapters out")
    if config.adapters is not None and config.init_from is None:
        raise UserError("adapters need init_from: the model that they stand on, which stays frozen")
    _check_teacher(config)


def _check_teacher(config: RunConfig) -> None:
    weight = config.distillation.weight
    if weight and config.objective != "language_model":
        raise UserError(
            f"distillation.weight {weight} is for objective language_model, not '{config.objective}'; leave it out"
        )
    if (learns := config.distillation.learns) is not None and config.adapters is not None:
        raise UserError(
            f"distillation.learns {list(learns)} is for runs without adapters, which say what learns beside them in "
            "adapters.modules_to_save; leave one of them out"
        )
    if learns is not None and config.init_from is None:
        raise UserError(
            f"distillation.learns {list(learns)} leaves parts of the model as they are; give init_from, which has them"
        )
    if weight and config.init_from is None and config.teacher is None:
        raise UserError(f"distillation.weight {weight} needs a teacher; give one, or init_from")
    if config.teacher is not None and not has_teacher(config):
        raise UserError(f"teacher {config.teacher} has nothing to teach; give distillation.weight, or leave it out")


def objective_of(config: RunConfig) -> Objective:
    """Builds the objective of a run, whose model is fully described.

    Raises:
        UserError: there can be no such one.
    """
    objective: Any = kind_of(config).build(config)
    if (trainable := trainable_filter(config)) is not None:
        objective = PartialTraining(objective, trainable, config.training.seed)
    return objective


def trainable_filter(config: RunConfig) -> TrainableFilter | None:
    """The trained parameters of the model; None is all, or heads on a frozen model."""
    transfers = config.objective == "attention_transfer"
    own = config.transfer.learns if transfers else config.distillation.learns
    parts = own if config.adapters is None else config.adapters.modules_to_save
    if parts is None:
        return None
    return TrainableFilter(parts, "attention" if transfers else None, config.transfer.layers if transfers else None)


def keeps_base(config: RunConfig) -> bool:
    """True if a run's checkpoints refer to a frozen model, in a place of its own."""
    return trainable_filter(config) is not None or not kind_of(config).trains.has_model


def has_teacher(config: RunConfig) -> bool:
    """True if another model says what is to be learnt."""
    return config.objective == "attention_transfer" or config.distillation.weight > 0
