"""Decoding: draft trees, drafters, acceptance rules, and the compiled loop on the recurrent state."""

from lin_jax.decoding.drafting.drafters import CopyDrafter as CopyDrafter
from lin_jax.decoding.drafting.drafters import LikeliestDrafter as LikeliestDrafter
from lin_jax.decoding.drafting.drafters import MedusaDrafter as MedusaDrafter
from lin_jax.decoding.drafting.drafters import ModelDrafter as ModelDrafter
from lin_jax.decoding.drafting.drafters import NgramDrafter as NgramDrafter
from lin_jax.decoding.drafting.drafters import NoDrafter as NoDrafter
from lin_jax.decoding.drafting.drafters import PathDrafter as PathDrafter
from lin_jax.decoding.drafting.drafters import SelfDrafter as SelfDrafter
from lin_jax.decoding.drafting.drafters import SuffixDrafter as SuffixDrafter
from lin_jax.decoding.drafting.drafters import UnionDrafter as UnionDrafter
from lin_jax.decoding.drafting.dynamic_tree import DynamicTree as DynamicTree
from lin_jax.decoding.drafting.text_memory import TextMemory as TextMemory
from lin_jax.decoding.drafting.tree import MC_SIM_7B_63 as MC_SIM_7B_63
from lin_jax.decoding.drafting.tree import AnyTree as AnyTree
from lin_jax.decoding.drafting.tree import DraftTree as DraftTree
from lin_jax.decoding.drafting.tree import chain as chain
from lin_jax.decoding.drafting.tree import parse_tree as parse_tree
from lin_jax.decoding.engine.loop_state import TokenOrigin as TokenOrigin
from lin_jax.decoding.engine.prefix_cache import Prefix as Prefix
from lin_jax.decoding.engine.sampling import Sampling as Sampling
from lin_jax.decoding.generator import Generator as Generator
from lin_jax.decoding.results import Generation as Generation
from lin_jax.decoding.results import Update as Update
from lin_jax.decoding.scheduler import Scheduler as Scheduler
