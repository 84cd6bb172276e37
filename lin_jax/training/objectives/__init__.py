"""What can be learnt, by name: the next token, classes of texts, draft heads on a model, or a model and its heads."""

from typing import Any

from lin_jax.training.objectives.classification import Classification as Classification
from lin_jax.training.objectives.draft_path import DraftPath as DraftPath
from lin_jax.training.objectives.language_model import LanguageModel as LanguageModel
from lin_jax.training.objectives.medusa import Medusa as Medusa
from lin_jax.training.objectives.medusa_joint import MedusaJoint as MedusaJoint
from lin_jax.training.objectives.objective import Objective as Objective
from lin_jax.training.objectives.objective import PartRate as PartRate

OBJECTIVES: dict[str, type[Any]] = {
    "classification": Classification,
    "language_model": LanguageModel,
    "medusa": Medusa,
    "medusa_joint": MedusaJoint,
    "path": DraftPath,
}
