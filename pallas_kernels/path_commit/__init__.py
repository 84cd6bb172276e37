"""Committing an accepted path to the state of augmented linear attention, as one operation."""

from pallas_kernels.path_commit.api import commit_path as commit_path
