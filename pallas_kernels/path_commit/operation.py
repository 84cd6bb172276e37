"""Committing an accepted path to the state of augmented linear attention: what follows `verify_tree`."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from jaxtyping import Array, Float, Int

from pallas_kernels.gpu_launch import obstacle as triton_obstacle
from pallas_kernels.implementations import choose, target_platform
from pallas_kernels.path_commit import gpu, tpu, xla
from pallas_kernels.tree_verify.problem import Held

IMPLEMENTATIONS: dict[str, Any] = {
    "xla": xla.commit,
    "tpu": tpu.commit,
    "tpu_interpreted": partial(tpu.commit, interpret=True),
    "gpu": gpu.commit,
    "gpu_interpreted": partial(gpu.commit, interpret=True),
}


def commit_path(
    held: Held,
    keys: Float[Array, "B P K D"],
    values: Float[Array, "B P K E"],
    length: Int[Array, " B"],
    *,
    implementation: str | Sequence[str] | None = None,
) -> Held:
    """The state after the first tokens of a path; the memory changes only in rows that finish a group.

    The state's own arrays are changed where they lie if they are donated to the program.

    Args:
        held: the state.
        keys: `[B, P, K, D]` of the path from the root down, as they are scored; P is at most a group's size.
        values: `[B, P, K, E]`.
        length: `[B]` how many tokens of the path are accepted, 0 to P.
        implementation: `xla`, `tpu`, `gpu`, `tpu_interpreted` or `gpu_interpreted` (anywhere, slow, for tests), several
            in order of preference, or None for what suits the platform, the types and the shapes; on a GPU that is XLA.

    Raises:
        UnsupportedError: the implementation that was asked for cannot run here or with these types.
        ValueError: the path is longer than a group.
    """
    if keys.shape[1] > held.keys.shape[1]:
        raise ValueError(f"the path has {keys.shape[1]} tokens, a group {held.keys.shape[1]}; give a shorter one")
    kinds = {str(each.dtype) for each in (held.keys, held.values)}
    obstacle = None
    if kinds not in ({"float32"}, {"bfloat16"}) or str(held.memory.dtype) != "float32":
        obstacle = (
            f"the state holds {', '.join(sorted(kinds))} and {held.memory.dtype}, not float32 or bfloat16 and float32"
        )
    key_size, value_size = held.memory.shape[2:]
    triton = partial(triton_obstacle, "path_commit", key_size, value_size, held.keys.dtype)
    obstacles = {
        name: obstacle or (triton(interpret=name == "gpu_interpreted") if name.startswith("gpu") else None)
        for name in IMPLEMENTATIONS
    } | {"xla": None}
    # Another kernel that wrote in place lost a part of it on a GPU; this one has not been seen there.
    default = ("xla",) if target_platform() == "gpu" else None
    return IMPLEMENTATIONS[choose("commit_path", implementation, obstacles, default=default)](
        held, keys, values, length
    )
