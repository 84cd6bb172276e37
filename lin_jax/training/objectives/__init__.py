"""What can be learnt: a model, its attention, classes of texts, draft heads on a model, or a model with its heads."""

from lin_jax.training.objectives.attention_transfer import AttentionTransfer as AttentionTransfer
from lin_jax.training.objectives.attention_transfer import TransferConfig as TransferConfig
from lin_jax.training.objectives.choosing import OBJECTIVES as OBJECTIVES
from lin_jax.training.objectives.choosing import check_objective as check_objective
from lin_jax.training.objectives.choosing import has_teacher as has_teacher
from lin_jax.training.objectives.choosing import keeps_base as keeps_base
from lin_jax.training.objectives.choosing import objective_of as objective_of
from lin_jax.training.objectives.classification import Classification as Classification
from lin_jax.training.objectives.distilled import DistillationConfig as DistillationConfig
from lin_jax.training.objectives.distilled import Distilled as Distilled
from lin_jax.training.objectives.draft_path import DraftPath as DraftPath
from lin_jax.training.objectives.language_model import LanguageModel as LanguageModel
from lin_jax.training.objectives.medusa import Medusa as Medusa
from lin_jax.training.objectives.medusa_joint import MedusaJoint as MedusaJoint
from lin_jax.training.objectives.objective import Objective as Objective
from lin_jax.training.objectives.objective import PartRate as PartRate
from lin_jax.training.objectives.partly import Partly as Partly
from lin_jax.training.objectives.partly import initial_key as initial_key
