"""What mixes tokens: attentions by name, from small parts, in forms that agree."""

from lin_jax.attention.bias import RelativeBias as RelativeBias
from lin_jax.attention.composition import ComposedAttention as ComposedAttention
from lin_jax.attention.feature_maps import redraw as redraw
from lin_jax.attention.layout import Layout as Layout
from lin_jax.attention.layout import masked_rows as masked_rows
from lin_jax.attention.layout import packed_rows as packed_rows
from lin_jax.attention.layout import padded_rows as padded_rows
from lin_jax.attention.layout import single_rows as single_rows
from lin_jax.attention.layout import whole_rows as whole_rows
from lin_jax.attention.mixer import AttentionConfig as AttentionConfig
from lin_jax.attention.mixer import BidirectionalMixer as BidirectionalMixer
from lin_jax.attention.mixer import Conventions as Conventions
from lin_jax.attention.mixer import CrossMixer as CrossMixer
from lin_jax.attention.mixer import Nodes as Nodes
from lin_jax.attention.mixer import TokenMixer as TokenMixer
from lin_jax.attention.mixer import along as along
from lin_jax.attention.registry import REGISTRY as REGISTRY
from lin_jax.attention.registry import build_mixer as build_mixer
from lin_jax.attention.registry import grows as grows
from lin_jax.attention.registry import longest_path as longest_path
from lin_jax.attention.registry import parse_name as parse_name
from lin_jax.attention.tree import TreeArrays as TreeArrays
from lin_jax.attention.tree import tree_arrays as tree_arrays
