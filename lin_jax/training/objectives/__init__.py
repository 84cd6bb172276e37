"""Objectives: a model, its attention, a classifier, draft heads on a model, or a model with its heads."""

from lin_jax.training.objectives.attention_transfer import AttentionTransfer as AttentionTransfer
from lin_jax.training.objectives.classification import Classification as Classification
from lin_jax.training.objectives.distillation import Distillation as Distillation
from lin_jax.training.objectives.medusa import Medusa as Medusa
from lin_jax.training.objectives.medusa_joint import MedusaJoint as MedusaJoint
from lin_jax.training.objectives.next_token import NextToken as NextToken
from lin_jax.training.objectives.objective import Objective as Objective
from lin_jax.training.objectives.objective import PartRate as PartRate
from lin_jax.training.objectives.objective import training_sums as training_sums
from lin_jax.training.objectives.partial_training import PartialTraining as PartialTraining
from lin_jax.training.objectives.partial_training import initial_key as initial_key
from lin_jax.training.objectives.path_head import PathHeadObjective as PathHeadObjective
