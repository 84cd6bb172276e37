"""Verification of a draft tree against the state of augmented linear attention."""

from pallas_kernels.tree_verify.api import verify_tree as verify_tree
