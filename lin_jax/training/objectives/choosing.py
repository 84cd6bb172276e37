"""The objective that a run's options come to: one by its name, perhaps with a teacher, perhaps learning only partly."""

from typing import TYPE_CHECKING, Any

from lin_jax.errors import UserError
from lin_jax.models.registry import CLASSIFIER, model_class
from lin_jax.training.adapters import Learning
from lin_jax.training.objectives.attention_transfer import AttentionTransfer
from lin_jax.training.objectives.classification import Classification
from lin_jax.training.objectives.distilled import Distilled
from lin_jax.training.objectives.draft_path import DraftPath
from lin_jax.training.objectives.language_model import LanguageModel
from lin_jax.training.objectives.medusa import Medusa
from lin_jax.training.objectives.medusa_joint import MedusaJoint
from lin_jax.training.objectives.objective import Objective
from lin_jax.training.objectives.partly import Partly

if TYPE_CHECKING:
    from lin_jax.training.config import RunConfig

OBJECTIVES: dict[str, type[Any]] = {
    "attention_transfer": AttentionTransfer,
    "classification": Classification,
    "language_model": LanguageModel,
    "medusa": Medusa,
    "medusa_joint": MedusaJoint,
    "path": DraftPath,
}


def check_objective(config: "RunConfig") -> None:
    """Refuses options that do not fit each other.

    Raises:
        UserError: they do not.
    """
    if config.objective not in OBJECTIVES:
        raise UserError(f"objective '{config.objective}' is unknown; choose one of {', '.join(sorted(OBJECTIVES))}")
    kind = OBJECTIVES[config.objective]
    if kind.has_model:
        model_class(config.model, kind.purpose)
    if config.data.task is not None and kind.purpose != CLASSIFIER:
        raise UserError(f"data.task is for objective classification, and this one is '{config.objective}'")
    if config.data.task is None and config.training.epochs is not None:
        raise UserError("training.epochs is for data.task; give training.steps for text")
    kind.check(config)
    if config.adapters is not None and not kind.has_model:
        raise UserError(f"adapters are for models, and objective '{config.objective}' learns heads; leave adapters out")
    if config.adapters is not None and config.init_from is None:
        raise UserError("adapters need init_from: the model that they stand on, which stays frozen")
    if config.distillation.weight and config.objective != "language_model":
        raise UserError(
            f"distillation.weight {config.distillation.weight} is for objective language_model, "
            f"not '{config.objective}'; leave it out"
        )
    if config.distillation.weight and config.init_from is None and config.teacher is None:
        raise UserError(f"distillation.weight {config.distillation.weight} needs a teacher; give one, or init_from")
    if config.teacher is not None and not has_teacher(config):
        raise UserError(f"teacher {config.teacher} has nothing to teach; give distillation.weight, or leave it out")


def objective_of(config: "RunConfig") -> Objective:
    """The objective of a run, whose model is fully described.

    Raises:
        UserError: there can be no such one.
    """
    kind = Distilled if config.distillation.weight else OBJECTIVES[config.objective]
    objective: Any = kind.of(config)
    if (learning := learning_of(config)) is not None:
        objective = Partly(objective, learning, config.training.seed)
    return objective


def learning_of(config: "RunConfig") -> Learning | None:
    """Which parameters of the model learn; None is all, or heads on a frozen model."""
    transfers = config.objective == "attention_transfer"
    if config.adapters is None and not transfers:
        return None
    parts = config.transfer.learns if config.adapters is None else config.adapters.also
    return Learning(parts, "attention" if transfers else None, config.transfer.layers if transfers else None)


def keeps_base(config: "RunConfig") -> bool:
    """Whether a run's checkpoints refer to a frozen model, in a place of its own."""
    return learning_of(config) is not None or not OBJECTIVES[config.objective].has_model


def has_teacher(config: "RunConfig") -> bool:
    """Whether another model says what is to be learnt."""
    return config.objective == "attention_transfer" or config.distillation.weight > 0
