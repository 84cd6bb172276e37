"""Augmented linear attention by the operations of `pallas_kernels`: all branches in one pass."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lin_jax.attention.bias import RelativeBias
from lin_jax.attention.branches import Branches
from lin_jax.attention.feature_maps import Identity
from lin_jax.attention.layout import Layout
from lin_jax.attention.local import relu_squared
from pallas_kernels.augmented_attention import PackedRows, PriorContext, augmented_attention
from pallas_kernels.chunks import first_segment_id
from pallas_kernels.path_commit import commit_path
from pallas_kernels.precision import accumulation_dtype
from pallas_kernels.tree_verify import verify_tree
from pallas_kernels.types import QKV, AugmentedState, Nodes, TreeArrays


def is_fused(branches: Branches, bias: RelativeBias | None) -> bool:
    """True where the operations compute these branches, as they do for the paper's LLaMA and GPT-2 recipes."""
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
    qkv: QKV,
    layout: Layout,
    state: AugmentedState | None,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B K D E"]]:
    """Outputs, and the memory after the rows, which has a meaning with a state only."""
    alpha, taps = _parameters(branches, qkv.queries.shape[2])
    prior = None if state is None else _prior_context(state, qkv.keys, qkv.values)
    return augmented_attention(
        *qkv,
        group_size=branches.group_size,
        alpha=alpha,
        taps=taps,
        local=branches.local is not None,
        unit=branches.unit_inputs,
        packed=None if layout.aligned and state is None else packed_row_arrays(layout),
        prior=prior,
        implementation=branches.implementation,
    )


def fused_verify(
    branches: Branches,
    qkv: QKV,
    tree: TreeArrays,
    state: AugmentedState,
) -> Float[Array, "B N H E"]:
    """Outputs of a draft tree's nodes."""
    alpha, taps = _parameters(branches, qkv.queries.shape[2])
    return verify_tree(
        *qkv,
        tree,
        state,
        alpha=alpha,
        taps=taps,
        local=branches.local is not None,
        unit=branches.unit_inputs,
        implementation=branches.implementation,
    )


def fused_commit(branches: Branches, state: AugmentedState, path: Nodes, length: Int[Array, " B"]) -> AugmentedState:
    """The state after the first `length` nodes of a path."""
    return commit_path(state, path, length, implementation=branches.implementation)


def _parameters(branches: Branches, heads: int) -> tuple[Array | None, Array | None]:
    """Alpha `[H]` and taps `[H, W]`, as far as there are these branches."""
    alpha = taps = None
    if branches.linear is not None:
        alpha = jnp.ones((heads,)) if branches.alpha is None else jnp.broadcast_to(branches.alpha[...], (heads,))
    if branches.convolution is not None:
        taps = branches.convolution.taps[...]
    return alpha, taps


def packed_row_arrays(layout: Layout) -> PackedRows:
    """Segment ids and positions of rows as the operations take them."""
    segment_ids, positions = layout.segment_ids, layout.positions
    first = first_segment_id(segment_ids)
    end = jnp.max(jnp.where(segment_ids > 0, jnp.arange(segment_ids.shape[1]), -1), axis=1)
    last = jnp.take_along_axis(segment_ids, jnp.maximum(end, 0)[:, None], axis=1)[:, 0]
    count = jnp.take_along_axis(positions, jnp.maximum(end, 0)[:, None], axis=1)[:, 0] + 1
    empty = end < 0
    return PackedRows(segment_ids, positions, first, jnp.where(empty, first, last), jnp.where(empty, 0, count))


def _prior_context(state: AugmentedState, keys: Array, values: Array) -> PriorContext:
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
    memory = state.memory
    if memory is None:
        batch, _, kv_heads, key_size = state.keys.shape
        memory = jnp.zeros((batch, kv_heads, key_size, values.shape[3]), accumulation_dtype(values.dtype))
    return PriorContext(
        memory,
        found_keys.astype(keys.dtype),
        found_values.astype(values.dtype),
        jnp.where(held & (positions >= 0), positions, -1),
        ~open_group,
    )
