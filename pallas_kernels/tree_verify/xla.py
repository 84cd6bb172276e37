"""Verification of a draft tree in plain XLA."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.augmented_attention.blocks import unit_rows
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
    all_keys = jnp.concatenate([state.keys.astype(keys.dtype), keys], axis=1)
    all_values = jnp.concatenate([state.values.astype(values.dtype), values], axis=1)
    exact = "highest" if values.dtype == wide else None
    scores = jnp.einsum("bnkrd,bmkd->bkrnm", queries, all_keys, preferred_element_type=wide, precision=exact)
    branch = branches(problem)[:, None, None]
    weights = jnp.zeros_like(scores)
    if local:
        weights += jnp.where(branch == LOCAL, jnp.square(jnp.maximum(scores, 0)), 0)
    outputs = jnp.zeros((), wide)
    if problem.alpha is not None and state.memory is not None:
        alpha = problem.alpha.astype(wide).reshape(kv_heads, -1)
        weights += jnp.where(branch == EARLIER, alpha[:, :, None, None] * scores, 0)
        read = jnp.einsum("bnkrd,bkde->bnkre", queries.astype(wide), state.memory.astype(wide), precision="highest")
        outputs = alpha[..., None] * read
    if problem.taps is not None:
        into_window, among = convolution_matrices(problem.taps.astype(values.dtype), problem.tree)
        among = jnp.broadcast_to(among, (batch, heads, nodes, nodes)).reshape(batch, kv_heads, -1, nodes, nodes)
        filtered = values
        if state.window is not None:
            into = jnp.broadcast_to(into_window, (batch, *into_window.shape[-3:]))
            among = jnp.concatenate([into.reshape(batch, kv_heads, -1, *into.shape[2:]), among], axis=-1)
            filtered = jnp.concatenate([state.window.astype(values.dtype), values], axis=1)
        outputs = outputs + _weighted(among, filtered, exact)
    outputs = outputs + _weighted(weights.astype(values.dtype), all_values, exact)
    return outputs.reshape(batch, nodes, heads, -1).astype(values.dtype)


def _weighted(weights: Array, values: Array, precision: str | None) -> Float[Array, "B N K R E"]:
    wide = accumulation_dtype(values.dtype)
    return jnp.einsum("bkrnm,bmke->bnkre", weights, values, preferred_element_type=wide, precision=precision)
