"""Verification of a draft tree as one operation: all nodes, all branches, the memory read once."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from jaxtyping import Array, Float

from pallas_kernels.implementations import choose_implementation
from pallas_kernels.obstacles import obstacles_of, unlike_types
from pallas_kernels.tree_verify import gpu, tpu, xla
from pallas_kernels.tree_verify.problem import VerifyProblem
from pallas_kernels.types import AugmentedState, TreeArrays

IMPLEMENTATIONS: dict[str, Any] = {
    "xla": xla.verify,
    "tpu": tpu.verify,
    "tpu_interpreted": partial(tpu.verify, interpret=True),
    "gpu": gpu.verify,
    "gpu_interpreted": partial(gpu.verify, interpret=True),
}


def verify_tree(
    queries: Float[Array, "B N H D"],
    keys: Float[Array, "B N K D"],
    values: Float[Array, "B N K E"],
    tree: TreeArrays,
    state: AugmentedState,
    *,
    alpha: Float[Array, " H"] | None = None,
    taps: Float[Array, "H W"] | None = None,
    local: bool = True,
    unit: bool = True,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "B N H E"]:
    """Outputs of a draft tree's nodes on top of a state, exact also where a path crosses the end of a group.

    A node sees the unfinished group's tokens and the nodes above it: those of its own group through the local branch,
    those of earlier groups through the grouped one; all finished groups through the memory; and the convolution walks
    up its ancestors and then into the window.

    Args:
        queries: `[B, N, H, D]`.
        keys: `[B, N, K, D]`; H is a multiple of K.
        values: `[B, N, K, E]`.
        tree: depths and ancestry.
        state: the state; its group's size is that of `state.keys`, and without a grouped branch it needs no memory.
        alpha: `[H]` factor of the grouped branch; None leaves the branch out.
        taps: `[H, W]` of the convolution, lag 0 first; None leaves it out.
        local: whether there is a local branch.
        unit: scale queries and keys to length one.
        implementation: `xla`, `tpu`, `gpu`, `tpu_interpreted` or `gpu_interpreted` (anywhere, slow, for tests), several
            in order of preference, or None for what suits the platform, the types and the shapes.

    Raises:
        UnsupportedError: the implementation that was asked for cannot run here or with these types.
        ValueError: there is a grouped branch, and a state without a memory.
    """
    if alpha is not None and state.memory is None:
        raise ValueError("the grouped branch reads a memory, which the state lacks; give one, or leave alpha out")
    problem = VerifyProblem(queries, keys, values, alpha, taps, tree, state)
    unlike = unlike_types(queries, keys, values)
    obstacles = obstacles_of(IMPLEMENTATIONS, "tree_verify", keys, values, programs=unlike)
    name = choose_implementation("verify_tree", implementation, obstacles)
    return IMPLEMENTATIONS[name](problem, unit_inputs=unit, local=local)
