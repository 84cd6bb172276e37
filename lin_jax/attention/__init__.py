"""What mixes tokens: local, grouped and convolution branches, their composition, and softmax."""

from lin_jax.attention.augmented import AugmentedAttention as AugmentedAttention
from lin_jax.attention.layout import Layout as Layout
from lin_jax.attention.layout import packed_rows as packed_rows
from lin_jax.attention.layout import padded_rows as padded_rows
from lin_jax.attention.layout import whole_rows as whole_rows
from lin_jax.attention.mixer import AttentionConfig as AttentionConfig
from lin_jax.attention.mixer import Nodes as Nodes
from lin_jax.attention.mixer import TokenMixer as TokenMixer
from lin_jax.attention.registry import REGISTRY as REGISTRY
from lin_jax.attention.registry import build_mixer as build_mixer
from lin_jax.attention.softmax import SoftmaxAttention as SoftmaxAttention
from lin_jax.attention.tree import TreeArrays as TreeArrays
from lin_jax.attention.tree import tree_arrays as tree_arrays
