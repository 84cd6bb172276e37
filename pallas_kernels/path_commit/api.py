"""Committing an accepted path to the state of augmented linear attention: what follows `verify_tree`."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from jaxtyping import Array, Int

from pallas_kernels.implementations import choose_implementation, target_platform
from pallas_kernels.obstacles import obstacles_of
from pallas_kernels.path_commit import gpu, tpu, xla
from pallas_kernels.types import AugmentedState, Nodes

IMPLEMENTATIONS: dict[str, Any] = {
    "xla": xla.commit,
    "tpu": tpu.commit,
    "tpu_interpreted": partial(tpu.commit, interpret=True),
    "gpu": gpu.commit,
    "gpu_interpreted": partial(gpu.commit, interpret=True),
}


def commit_path(
    state: AugmentedState,
    path: Nodes,
    length: Int[Array, " B"],
    *,
    implementation: str | Sequence[str] | None = None,
) -> AugmentedState:
    """The state after the first tokens of a path; the memory changes only in rows that finish a group.

    The state's own arrays are changed where they lie if they are donated to the program.

    Args:
        state: the state; without a memory, XLA alone can go on from it.
        path: P nodes from the root down, their keys as they are scored; P is at most a group's size.
        length: `[B]` how many tokens of the path are accepted, 0 to P.
        implementation: `xla`, `tpu`, `gpu`, `tpu_interpreted` or `gpu_interpreted` (anywhere, slow, for tests), several
            in order of preference, or None for what suits the platform, the types and the shapes; on a GPU that is XLA.

    Raises:
        UnsupportedError: the implementation that was asked for cannot run here or with these types.
        ValueError: the path is longer than a group.
    """
    if path.keys.shape[1] > state.keys.shape[1]:
        raise ValueError(f"the path has {path.keys.shape[1]} tokens, a group {state.keys.shape[1]}; give a shorter one")
    obstacles = obstacles_of(IMPLEMENTATIONS, "path_commit", state.keys, state.values, programs=_obstacle(state))
    # Another kernel that wrote in place lost a part of it on a GPU; this one has not been seen there.
    default = ("xla",) if target_platform() == "gpu" else None
    name = choose_implementation("commit_path", implementation, obstacles, default=default)
    return IMPLEMENTATIONS[name](state, path, length)


def _obstacle(state: AugmentedState) -> str | None:
    """The reason why kernels cannot take a state, None if they can."""
    if state.memory is None:
        return "the state has no memory to fold groups into"
    kinds = {str(each.dtype) for each in (state.keys, state.values)}
    if kinds in ({"float32"}, {"bfloat16"}) and str(state.memory.dtype) == "float32":
        return None
    return f"the state holds {', '.join(sorted(kinds))} and {state.memory.dtype}, not float32 or bfloat16 and float32"
