"""Augmented linear attention by the operations of `pallas_kernels`: all branches in one pass."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lin_jax.attention.bias import RelativeBias
from lin_jax.attention.branches import Branches
from lin_jax.attention.feature_maps import Identity
from lin_jax.attention.layout import Layout, first_document
from lin_jax.attention.local import relu_squared
from lin_jax.attention.mixer import Nodes
from lin_jax.attention.pairs import accumulation_dtype
from lin_jax.attention.state import AugmentedState
from lin_jax.attention.tree import TreeArrays
from pallas_kernels.augmented_attention import Placement, Start, augmented_attention
from pallas_kernels.path_commit import commit_path
from pallas_kernels.tree_verify import Held, Tree, verify_tree


def is_fused(branches: Branches, bias: RelativeBias | None) -> bool:
    """Whether the operations compute these branches: those of the paper's LLaMA and GPT-2 recipes they do."""
    local, linear = branches.local, branches.linear
    plain = not (branches.angular or branches.merged_norm or branches.unit_values)
    if not plain or bias is not None or (local is None and linear is None):
        return False
    if local is not None:
        scored = local.score is relu_squared and local.scale == 1 and local.size is None
        if not scored or (local.unit and not branches.unit_inputs):
            return False
    if linear is None:
        return True
    whole = isinstance(linear.features, Identity) and linear.features.start == 0
    return whole and linear.reach == "earlier" and linear.finish is None and linear.scale == 1


def fused(
    branches: Branches,
    queries: Float[Array, "B T H D"],
    keys: Float[Array, "B T K D"],
    values: Float[Array, "B T K E"],
    layout: Layout,
    state: AugmentedState | None,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B K D E"]]:
    """Outputs, and the memory after the rows (only with a state has it a meaning)."""
    alpha, taps = _parameters(branches, queries.shape[2])
    start = None if state is None else _start(state, keys, values)
    return augmented_attention(
        queries,
        keys,
        values,
        group_size=branches.group_size,
        alpha=alpha,
        taps=taps,
        local=branches.local is not None,
        unit=branches.unit_inputs,
        placement=None if layout.aligned and state is None else _placement(layout),
        start=start,
        implementation=branches.implementation,
    )


def fused_verify(
    branches: Branches,
    queries: Float[Array, "B N H D"],
    keys: Float[Array, "B N K D"],
    values: Float[Array, "B N K E"],
    tree: TreeArrays,
    state: AugmentedState,
) -> Float[Array, "B N H E"]:
    """Outputs of a draft tree's nodes."""
    alpha, taps = _parameters(branches, queries.shape[2])
    return verify_tree(
        queries,
        keys,
        values,
        Tree(tree.depth, tree.ancestors),
        Held(_memory(state, values), state.keys, state.values, state.window, state.position),
        alpha=alpha,
        taps=taps,
        local=branches.local is not None,
        unit=branches.unit_inputs,
        implementation=branches.implementation,
    )


def fused_commit(branches: Branches, state: AugmentedState, path: Nodes, length: Int[Array, " B"]) -> AugmentedState:
    """The state after the first `length` nodes of a path."""
    held = Held(_memory(state, path.values), state.keys, state.values, state.window, state.position)
    return AugmentedState(*commit_path(held, path.keys, path.values, length, implementation=branches.implementation))


def _parameters(branches: Branches, heads: int) -> tuple[Array | None, Array | None]:
    """Alpha `[H]` and taps `[H, W]`, as far as there are these branches."""
    alpha = taps = None
    if branches.linear is not None:
        alpha = jnp.ones((heads,)) if branches.alpha is None else jnp.broadcast_to(branches.alpha[...], (heads,))
    if branches.convolution is not None:
        taps = branches.convolution.taps[...]
    return alpha, taps


def _memory(state: AugmentedState, values: Array) -> Float[Array, "B K D E"]:
    if state.memory is not None:
        return state.memory
    batch, _, kv_heads, size = state.keys.shape
    return jnp.zeros((batch, kv_heads, size, values.shape[3]), accumulation_dtype(values.dtype))


def _placement(layout: Layout) -> Placement:
    documents, positions = layout.documents, layout.positions
    first = first_document(documents)
    end = jnp.max(jnp.where(documents > 0, jnp.arange(documents.shape[1]), -1), axis=1)
    last = jnp.take_along_axis(documents, jnp.maximum(end, 0)[:, None], axis=1)[:, 0]
    count = jnp.take_along_axis(positions, jnp.maximum(end, 0)[:, None], axis=1)[:, 0] + 1
    empty = end < 0
    return Placement(documents, positions, first, jnp.where(empty, first, last), jnp.where(empty, 0, count))


def _start(state: AugmentedState, keys: Array, values: Array) -> Start:
    """The tokens just before a row: the unfinished group's, and further back what the convolution's window holds."""
    size, position = state.keys.shape[1], state.position[:, None]
    reach = 0 if state.window is None else state.window.shape[1]
    distance = jnp.arange(max(size, reach), 0, -1)
    positions = position - distance
    open_group = positions >= position // size * size
    slot = (positions % size)[:, :, None, None]
    found_keys = jnp.take_along_axis(state.keys, slot, axis=1)
    found_values = jnp.take_along_axis(state.values, slot, axis=1)
    held = open_group
    if state.window is not None and reach:
        index = jnp.clip(reach - distance, 0, reach - 1)[None, :, None, None]
        found_values = jnp.where(
            open_group[:, :, None, None], found_values, jnp.take_along_axis(state.window, index, axis=1)
        )
        held = open_group | (distance <= reach)
    return Start(
        _memory(state, values),
        found_keys.astype(keys.dtype),
        found_values.astype(values.dtype),
        jnp.where(held & (positions >= 0), positions, -1),
        ~open_group,
    )
