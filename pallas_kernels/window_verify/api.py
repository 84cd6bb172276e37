"""Verification of a draft tree by a window and a memory as one operation: all nodes, the memory read once."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.implementations import choose_implementation
from pallas_kernels.obstacles import obstacles_of, unlike_types
from pallas_kernels.precision import accumulation_dtype
from pallas_kernels.types import TreeArrays, WindowedState
from pallas_kernels.window_verify import gpu, tpu, xla
from pallas_kernels.window_verify.problem import WindowVerifyProblem
from pallas_kernels.windowed_attention.problem import AttentionWindowPlan, Features, FeatureWeights

IMPLEMENTATIONS: dict[str, Any] = {
    "xla": xla.verify,
    "tpu": tpu.verify,
    "tpu_interpreted": partial(tpu.verify, interpret=True),
    "gpu": gpu.verify,
    "gpu_interpreted": partial(gpu.verify, interpret=True),
}


def verify_window(
    queries: Float[Array, "B N H D"],
    keys: Float[Array, "B N K D"],
    values: Float[Array, "B N K E"],
    weights: FeatureWeights,
    tree: TreeArrays,
    state: WindowedState,
    *,
    features: Features,
    group_size: int = 64,
    groups: int = 1,
    tokens: int | None = None,
    scale: float,
    balance: Float[Array, " H"] | None = None,
    log_decays: Float[Array, "B N K"] | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "B N H E"]:
    """Outputs of a draft tree's nodes on top of a state, exact also where a path leaves the window.

    A node attends to the tokens of its window, to the nodes above it and to the state's sinks by softmax, to the memory
    by features; what lies before a node's window, though it is not in the memory yet, counts by features, too. The
    formula, the feature maps and the window are those of `windowed_attention`.

    Args:
        queries: `[B, N, H, D]`, bfloat16 or float32.
        keys: `[B, N, K, D]`; H is a multiple of K.
        values: `[B, N, K, E]`.
        weights: the feature map's learnt parts; m features, twice as many with `hedgehog`.
        tree: depths and ancestry.
        state: the state; the normaliser stands behind the values in its memory, and it has the sinks, if there are any.
        features: `exponential` or `hedgehog`.
        group_size: tokens of a group, by position.
        groups: groups before the query's own that its window holds.
        tokens: a window of exactly so many tokens instead, the query's own included.
        scale: factor of q·k.
        balance: `[H]` logarithm of the memory's factor; None for zero.
        log_decays: `[B, N, K]` logarithms of each node's decay, not positive; None for no decay.
        implementation: `xla`, `tpu`, `gpu`, `tpu_interpreted` or `gpu_interpreted` (anywhere, slow, for tests), several
            in order of preference, or None for what suits the platform, the types and the shapes.

    Raises:
        UnsupportedError: the implementation that was asked for cannot run here or with these types.
        ValueError: there is decay in the state alone, or in the nodes alone; or the memory has other sizes.
    """
    _check(weights, state, values, features, log_decays)
    name = verify_implementation(queries, keys, values, state, implementation)
    wide = accumulation_dtype(values.dtype)
    balance = jnp.zeros((queries.shape[2],), wide) if balance is None else balance.astype(wide)
    # Weights that are narrower than rows, or of another half precision, are widened; float32 beside bfloat16 stays.
    weights = jax.tree.map(lambda each: each.astype(jnp.promote_types(each.dtype, queries.dtype)), weights)
    problem = WindowVerifyProblem(queries, keys, values, weights, balance, log_decays, tree, state)
    return IMPLEMENTATIONS[name](problem, AttentionWindowPlan(tokens, group_size, groups, scale, features))


def verify_implementation(
    queries: Array, keys: Array, values: Array, state: WindowedState, asked: str | Sequence[str] | None
) -> str:
    """The name of the implementation to run.

    Args:
        queries: as in `verify_window`.
        keys: likewise.
        values: likewise.
        state: likewise.
        asked: an implementation, several in order of preference, or None for what suits the platform.

    Raises:
        UnsupportedError: none of those that were asked for can run.
    """
    obstacle = unlike_types(queries, keys, values)
    if obstacle is None and state.memory.dtype != jnp.float32:
        obstacle = f"the memory is {state.memory.dtype}, not float32"
    elif obstacle is None and not state.keys.shape[1]:
        obstacle = "the window holds no token before a node"
    obstacles = obstacles_of(IMPLEMENTATIONS, "window_verify", keys, values, programs=obstacle)
    return choose_implementation("verify_window", asked, obstacles)


def _check(
    weights: FeatureWeights, state: WindowedState, values: Array, features: Features, log_decays: Array | None
) -> None:
    if (state.decays is None) != (log_decays is None):
        raise ValueError("decays of the state and of the nodes belong together; give both, or neither")
    count = weights.keys.shape[1] * (2 if features == "hedgehog" else 1)
    if state.memory.shape[2:] != (count, values.shape[3] + 1):
        found = tuple(state.memory.shape[2:])
        raise ValueError(
            f"the memory has {found} numbers a head; give ({count}, {values.shape[3] + 1}): features, values"
        )
