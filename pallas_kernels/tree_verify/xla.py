"""Verification of a draft tree in plain XLA."""

from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.augmented_attention.blocks import unit_rows
from pallas_kernels.pairs import recall
from pallas_kernels.precision import accumulation_dtype
from pallas_kernels.tree_verify.problem import EARLIER, LOCAL, VerifyProblem, branches, convolution_matrices


def verify(problem: VerifyProblem, *, unit_inputs: bool, local: bool) -> Float[Array, "B N H E"]:
    """Outputs of the nodes."""
    state, values = problem.state, problem.values
    batch, nodes, heads, size = problem.queries.shape
    kv_heads = values.shape[2]
    wide = accumulation_dtype(values.dtype)
    queries, keys = problem.queries, problem.keys
    if unit_inputs:
        queries, keys = unit_rows(queries), unit_rows(keys)
    queries = queries.reshape(batch, nodes, kv_heads, -1, size)
    exact = "highest" if values.dtype == wide else None
    outputs, alpha = jnp.zeros((), wide), None
    if problem.alpha is not None and state.memory is not None:
        alpha = problem.alpha.astype(wide).reshape(kv_heads, -1, 1)
        outputs = alpha * _read(queries.astype(wide), state.memory.astype(wide))
    all_keys = jnp.concatenate([state.keys.astype(keys.dtype), keys], axis=1)
    all_values = jnp.concatenate([state.values.astype(values.dtype), values], axis=1)
    scores = jnp.einsum("bnkrd,bmkd->bkrnm", queries, all_keys, preferred_element_type=wide, precision=exact)
    branch = branches(problem)[:, None, None]
    weights = jnp.zeros_like(scores)
    if local:
        weights += jnp.where(branch == LOCAL, jnp.square(jnp.maximum(scores, 0)), 0)
    if alpha is not None:
        weights += jnp.where(branch == EARLIER, alpha[..., None] * scores, 0)
    outputs = outputs + _weighted(weights.astype(values.dtype), all_values, exact)
    if problem.taps is not None:
        into_window, among = convolution_matrices(problem.taps.astype(values.dtype), problem.tree)
        among = jnp.broadcast_to(among, (batch, heads, nodes, nodes)).reshape(batch, kv_heads, -1, nodes, nodes)
        filtered = values
        if state.window is not None:
            into = jnp.broadcast_to(into_window, (batch, *into_window.shape[-3:]))
            among = jnp.concatenate([into.reshape(batch, kv_heads, -1, *into.shape[2:]), among], axis=-1)
            filtered = jnp.concatenate([state.window.astype(values.dtype), values], axis=1)
        outputs = outputs + _weighted(among, filtered, exact)
    return outputs.reshape(batch, nodes, heads, -1).astype(values.dtype)


# XLA for CPUs reads the memory and the values where they lie if they are the second operand of a single query; for
# several, it would transpose them there, the larger operand, and reads them in place as the first one.


def _read(queries: Float[Array, "B N K R D"], memory: Float[Array, "B K D E"]) -> Float[Array, "B N K R E"]:
    """Values that queries read from the memory."""
    if queries.shape[1] * queries.shape[3] > 1:
        return recall(queries, memory)
    return jnp.einsum("bnkrd,bkde->bnkre", queries, memory, precision="highest")


def _weighted(weights: Array, values: Array, precision: str | None) -> Float[Array, "B N K R E"]:
    """Sums of values under weights `[B, K, R, N, M]`."""
    wide, several = accumulation_dtype(values.dtype), weights.shape[2] * weights.shape[3] > 1
    product = partial(jnp.einsum, preferred_element_type=wide, precision=precision)
    if several:
        return product("bmke,bkrnm->bnkre", values, weights)
    return product("bkrnm,bmke->bnkre", weights, values)
