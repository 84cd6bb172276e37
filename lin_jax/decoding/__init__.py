"""Decoding: trees, drafters, acceptance, and the compiled loop on the recurrent state."""

from lin_jax.decoding.decoding import Decoding as Decoding
from lin_jax.decoding.drafters import MedusaDrafter as MedusaDrafter
from lin_jax.decoding.drafters import ModelDrafter as ModelDrafter
from lin_jax.decoding.drafters import NgramDrafter as NgramDrafter
from lin_jax.decoding.drafters import NoDrafter as NoDrafter
from lin_jax.decoding.drafters import PathDrafter as PathDrafter
from lin_jax.decoding.drafters import SelfDrafter as SelfDrafter
from lin_jax.decoding.drafters import UnionDrafter as UnionDrafter
from lin_jax.decoding.dynamic import DynamicTree as DynamicTree
from lin_jax.decoding.generation import Generation as Generation
from lin_jax.decoding.generation import Update as Update
from lin_jax.decoding.generator import Generator as Generator
from lin_jax.decoding.prefix import Prefix as Prefix
from lin_jax.decoding.sampling import Sampling as Sampling
from lin_jax.decoding.tree import MC_SIM_7B_63 as MC_SIM_7B_63
from lin_jax.decoding.tree import DraftTree as DraftTree
from lin_jax.decoding.tree import chain as chain
from lin_jax.decoding.tree import parse_tree as parse_tree
