"""Token mixers: attentions by name, from small parts, in forms that agree."""

from lin_jax.attention.bias import RelativeBias as RelativeBias
from lin_jax.attention.composition import ComposedAttention as ComposedAttention
from lin_jax.attention.config import AttentionConfig as AttentionConfig
from lin_jax.attention.config import Conventions as Conventions
from lin_jax.attention.feature_maps import redraw as redraw
from lin_jax.attention.layout import Layout as Layout
from lin_jax.attention.layout import masked_rows as masked_rows
from lin_jax.attention.layout import packed_rows as packed_rows
from lin_jax.attention.layout import padded_rows as padded_rows
from lin_jax.attention.layout import single_rows as single_rows
from lin_jax.attention.layout import whole_rows as whole_rows
from lin_jax.attention.protocols import BidirectionalMixer as BidirectionalMixer
from lin_jax.attention.protocols import CrossMixer as CrossMixer
from lin_jax.attention.protocols import TokenMixer as TokenMixer
from lin_jax.attention.protocols import gather_nodes as gather_nodes
from lin_jax.attention.registry import REGISTRY as REGISTRY
from lin_jax.attention.registry import build_mixer as build_mixer
from lin_jax.attention.registry import has_growing_state as has_growing_state
from lin_jax.attention.registry import max_draft_depth as max_draft_depth
from lin_jax.attention.registry import parse_name as parse_name
from lin_jax.attention.registry import softmax_window as softmax_window
from lin_jax.attention.tree import tree_arrays as tree_arrays
from pallas_kernels.types import QKV as QKV
from pallas_kernels.types import AugmentedState as AugmentedState
from pallas_kernels.types import Nodes as Nodes
from pallas_kernels.types import TreeArrays as TreeArrays
