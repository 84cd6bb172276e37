"""Verification of a draft tree against the state of augmented linear attention."""

from pallas_kernels.tree_verify.operation import verify_tree as verify_tree
from pallas_kernels.tree_verify.problem import Held as Held
from pallas_kernels.tree_verify.problem import Tree as Tree
