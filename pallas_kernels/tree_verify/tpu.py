"""Verification of a draft tree on TPU: one Pallas program for a row and a few heads, which reads the memory once."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.augmented_attention.blocks import unit_rows
from pallas_kernels.products import matmul, memory_matmul
from pallas_kernels.tpu.heads import VMEM_BYTES, ProgramHeads, Ref, all_rows, flatten_heads
from pallas_kernels.tree_verify.problem import EARLIER, LOCAL, VerifyProblem, branches, convolution_matrices


class VerifyInputs(NamedTuple):
    """Inputs of a program.

    Attributes:
        queries: `[N, k R D]`.
        keys: `[N, k D]`.
        values: `[N, k E]`.
        group_keys: `[G, k D]` of the unfinished group.
        group_values: `[G, k E]`.
        memory: `[k, D, E]`, None without a grouped branch.
        branch: `[N, G + N]` the branch of each pair.
        window: `[W - 1, k E]`, None without a convolution.
        into_window: `[k R, N, W - 1]` the convolution over the window, None without one.
        among: `[k R, N, G + N]` the convolution over the group, where it is zero, and the nodes; None without one.
    """

    queries: Ref
    keys: Ref
    values: Ref
    group_keys: Ref
    group_values: Ref
    memory: Ref
    branch: Ref
    window: Ref
    into_window: Ref
    among: Ref


def verify(
    problem: VerifyProblem, *, unit_inputs: bool, local: bool, interpret: Any = False
) -> Float[Array, "B N H E"]:
    """Outputs of the nodes."""
    batch, nodes, query_heads, _ = problem.queries.shape
    kv_heads, value_size = problem.values.shape[2:]
    heads = ProgramHeads.of(problem.queries, problem.values)
    alpha = problem.alpha

    def kernel(factors: Ref, inputs: VerifyInputs, outputs: Ref) -> None:
        _kernel(None if alpha is None else factors, inputs, outputs, heads=heads, unit_inputs=unit_inputs, local=local)

    arrays = _arrays(problem)
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((batch, nodes, query_heads * value_size), problem.values.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, kv_heads // heads.together),
            in_specs=(_specs(arrays, heads),),
            out_specs=all_rows(nodes, heads.together * heads.share * value_size),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_BYTES),
        interpret=interpret,
        name="verify_tree",
    )(jnp.zeros((query_heads,)) if alpha is None else alpha.astype(jnp.float32), arrays).reshape(
        batch, nodes, query_heads, value_size
    )


def _kernel(
    factors: Ref, inputs: VerifyInputs, outputs: Ref, *, heads: ProgramHeads, unit_inputs: bool, local: bool
) -> None:
    first = pl.program_id(1) * heads.together * heads.share
    branch = inputs.branch[...]
    for head in range(heads.together):
        own, group = inputs.keys[:, heads.keys(head)], inputs.group_keys[:, heads.keys(head)]
        keys = jnp.concatenate([group, unit_rows(own) if unit_inputs else own], axis=0)
        part = heads.values(head)
        values = jnp.concatenate([inputs.group_values[:, part], inputs.values[:, part]], axis=0)
        for query_head in heads.queries(head):
            queries = inputs.queries[:, heads.keys(query_head)]
            queries = unit_rows(queries) if unit_inputs else queries
            scores = matmul(queries, keys, (1, 1))
            weights = jnp.zeros_like(scores)
            if local:
                weights += jnp.where(branch == LOCAL, jnp.square(jnp.maximum(scores, 0)), 0)
            if factors is not None:
                weights += jnp.where(branch == EARLIER, factors[first + query_head] * scores, 0)
            if inputs.among is not None:
                weights += inputs.among[query_head].astype(jnp.float32)
            result = matmul(weights.astype(values.dtype), values, (1, 0))
            if factors is not None:
                result += factors[first + query_head] * memory_matmul(queries, inputs.memory[head], (1, 0))
            if inputs.window is not None:
                result += matmul(inputs.into_window[query_head], inputs.window[:, part], (1, 0))
            outputs[:, heads.values(query_head)] = result.astype(outputs.dtype)


def _arrays(problem: VerifyProblem) -> VerifyInputs:
    state, values = problem.state, problem.values
    window = into = among = None
    if problem.taps is not None:
        into, among = convolution_matrices(problem.taps.astype(values.dtype), problem.tree)
        into, among = (each if each.ndim == 4 else each[None] for each in (into, among))
        among = jnp.pad(among, ((0, 0), (0, 0), (0, 0), (state.keys.shape[1], 0)))
        window = (
            None
            if state.window is None or state.window.shape[1] == 0
            else flatten_heads(state.window.astype(values.dtype))
        )
    return VerifyInputs(
        queries=flatten_heads(problem.queries),
        keys=flatten_heads(problem.keys),
        values=flatten_heads(values),
        group_keys=flatten_heads(state.keys.astype(problem.keys.dtype)),
        group_values=flatten_heads(state.values.astype(values.dtype)),
        memory=None if problem.alpha is None or state.memory is None else state.memory.astype(jnp.float32),
        branch=branches(problem),
        window=window,
        into_window=None if window is None else into,
        among=among,
    )


def _specs(arrays: VerifyInputs, heads: ProgramHeads) -> VerifyInputs:
    key, value = heads.together * heads.key_size, heads.together * heads.value_size

    memory = None
    if arrays.memory is not None:
        memory = pl.BlockSpec((None, heads.together, *arrays.memory.shape[2:]), lambda b, k, _: (b, k, 0, 0))

    def matrix(array: Array | None) -> pl.BlockSpec | None:
        if array is None:
            return None
        rows, _, *shape = array.shape
        together = heads.together * heads.share
        return pl.BlockSpec((None, together, *shape), lambda b, k, _: (b if rows > 1 else 0, k, 0, 0))

    return VerifyInputs(
        queries=all_rows(arrays.queries.shape[1], heads.share * key),
        keys=all_rows(arrays.keys.shape[1], key),
        values=all_rows(arrays.values.shape[1], value),
        group_keys=all_rows(arrays.group_keys.shape[1], key),
        group_values=all_rows(arrays.group_values.shape[1], value),
        memory=memory,
        branch=pl.BlockSpec((None, *arrays.branch.shape[1:]), lambda b, k, _: (b, 0, 0)),
        window=None if arrays.window is None else all_rows(arrays.window.shape[1], value),
        into_window=matrix(arrays.into_window),
        among=matrix(arrays.among),
    )
