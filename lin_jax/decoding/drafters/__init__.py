"""Drafters: where guesses come from."""

from lin_jax.decoding.drafters.medusa import MedusaDrafter as MedusaDrafter
from lin_jax.decoding.drafters.model import ModelDrafter as ModelDrafter
from lin_jax.decoding.drafters.model import SelfDrafter as SelfDrafter
from lin_jax.decoding.drafters.ngram import NgramDrafter as NgramDrafter
from lin_jax.decoding.drafters.none import NoDrafter as NoDrafter
from lin_jax.decoding.drafters.path import PathDrafter as PathDrafter
from lin_jax.decoding.drafters.registry import DRAFTERS as DRAFTERS
from lin_jax.decoding.drafters.registry import DraftParts as DraftParts
from lin_jax.decoding.drafters.registry import available as available
from lin_jax.decoding.drafters.registry import build_drafter as build_drafter
from lin_jax.decoding.drafters.union import UnionDrafter as UnionDrafter
