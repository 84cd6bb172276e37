"""Drafters, the sources of guesses, and their registry."""

from lin_jax.decoding.drafting.drafters.copy import CopyDrafter as CopyDrafter
from lin_jax.decoding.drafting.drafters.likeliest import LikeliestDrafter as LikeliestDrafter
from lin_jax.decoding.drafting.drafters.medusa import MedusaDrafter as MedusaDrafter
from lin_jax.decoding.drafting.drafters.model import ModelDrafter as ModelDrafter
from lin_jax.decoding.drafting.drafters.model import SelfDrafter as SelfDrafter
from lin_jax.decoding.drafting.drafters.ngram import NgramDrafter as NgramDrafter
from lin_jax.decoding.drafting.drafters.none import NoDrafter as NoDrafter
from lin_jax.decoding.drafting.drafters.path import PathDrafter as PathDrafter
from lin_jax.decoding.drafting.drafters.registry import DRAFTERS as DRAFTERS
from lin_jax.decoding.drafting.drafters.registry import DraftParts as DraftParts
from lin_jax.decoding.drafting.drafters.registry import available as available
from lin_jax.decoding.drafting.drafters.registry import build_drafter as build_drafter
from lin_jax.decoding.drafting.drafters.registry import reads_memory as reads_memory
from lin_jax.decoding.drafting.drafters.suffix import SuffixDrafter as SuffixDrafter
from lin_jax.decoding.drafting.drafters.union import UnionDrafter as UnionDrafter
