"""Log-probabilities of given texts, with the states of shared prefixes computed once."""

from lin_jax.decoding.scoring.prefix_tree import PrefixGroup as PrefixGroup
from lin_jax.decoding.scoring.prefix_tree import PrefixNode as PrefixNode
from lin_jax.decoding.scoring.prefix_tree import build_prefix_tree as build_prefix_tree
from lin_jax.decoding.scoring.prefix_tree import shared_prefix_groups as shared_prefix_groups
from lin_jax.decoding.scoring.scorer import ContinuationScorer as ContinuationScorer
from lin_jax.decoding.scoring.scorer import TokenScores as TokenScores
