"""Verification by a window and a memory on TPU: one Pallas program for a row and a few heads, the memory read once.

Keys of the ring have features only where a node stands beyond the window that they are in: elsewhere, which is nearly
everywhere, they are not computed.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.tpu.heads import VMEM_BYTES, ProgramHeads, Ref, all_rows, flatten_heads, upright
from pallas_kernels.window_verify.blocks import node_features, node_outputs
from pallas_kernels.window_verify.problem import FAR, WindowVerifyProblem, node_pairs, pair_clock
from pallas_kernels.windowed_attention.problem import AttentionWindowPlan


class WindowVerifyInputs(NamedTuple):
    """Inputs of a program.

    Attributes:
        queries: `[N, k R D]`.
        keys: `[S + N, k D]` of sinks and nodes.
        values: `[S + N, k E]`.
        ring_keys: `[C, k D]`.
        ring_values: `[C, k E]`.
        memory: `[k, E + 1, M]`, the normaliser behind the values.
        pairs: `[N, C + S + N]` the kind of each pair.
        clock: `[k, 1, C + S + N]` sums of the logarithms of decay, None without decay.
        query_map: `[k R, m, D]`.
        key_map: `[k, m, D]`.
        query_bias: `[k R, 1, m]`, None for zero.
        key_bias: `[k, 1, m]`, likewise.
    """

    queries: Ref
    keys: Ref
    values: Ref
    ring_keys: Ref
    ring_values: Ref
    memory: Ref
    pairs: Ref
    clock: Ref
    query_map: Ref
    key_map: Ref
    query_bias: Ref
    key_bias: Ref


def verify(
    problem: WindowVerifyProblem, window: AttentionWindowPlan, *, interpret: Any = False
) -> Float[Array, "B N H E"]:
    """Outputs of the nodes."""
    batch, nodes, query_heads, _ = problem.queries.shape
    kv_heads, value_size = problem.values.shape[2:]
    heads = ProgramHeads.of(problem.queries, problem.values)

    def kernel(balance: Ref, crosses: Ref, inputs: WindowVerifyInputs, outputs: Ref, features: Ref) -> None:
        _kernel(balance, crosses, inputs, outputs, features, heads=heads, window=window)

    arrays = _arrays(problem, window)
    crosses = jnp.any(arrays.pairs == FAR, axis=(1, 2)).astype(jnp.int32)
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((batch, nodes, query_heads * value_size), problem.values.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, kv_heads // heads.together),
            in_specs=(_specs(arrays, heads),),
            out_specs=all_rows(nodes, heads.together * heads.share * value_size),
            scratch_shapes=[pltpu.VMEM((arrays.pairs.shape[2], problem.features), problem.keys.dtype)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_BYTES),
        interpret=interpret,
        name="verify_window",
    )(problem.balance, crosses, arrays).reshape(batch, nodes, query_heads, value_size)


def _kernel(
    balance: Ref,
    crosses: Ref,
    inputs: WindowVerifyInputs,
    outputs: Ref,
    features: Ref,
    *,
    heads: ProgramHeads,
    window: AttentionWindowPlan,
) -> None:
    first = pl.program_id(1) * heads.together * heads.share
    crossing = crosses[pl.program_id(0)] > 0
    pairs = inputs.pairs[...]

    @pl.when(jnp.logical_not(crossing))
    def _() -> None:
        features[...] = jnp.zeros_like(features)

    for head in range(heads.together):
        own, part = heads.keys(head), heads.values(head)
        keys = jnp.concatenate([inputs.ring_keys[:, own], inputs.keys[:, own]], axis=0)
        values = jnp.concatenate([inputs.ring_values[:, part], inputs.values[:, part]], axis=0)
        memory = inputs.memory[head]
        clock = None if inputs.clock is None else upright(inputs.clock[head])
        bias = None if inputs.key_bias is None else inputs.key_bias[head]

        @pl.when(crossing)
        def _(keys: Array = keys, bias: Array | None = bias, head: int = head) -> None:
            features[...] = node_features(keys, inputs.key_map[head], bias, window, queries=False).rounded

        for query_head in heads.queries(head):
            queries = inputs.queries[:, heads.keys(query_head)]
            bias = None if inputs.query_bias is None else inputs.query_bias[query_head]
            asked = node_features(queries, inputs.query_map[query_head], bias, window, queries=True)
            factor = balance[first + query_head]
            found = node_outputs(queries, keys, values, asked, features[...], memory, factor, clock, pairs, window)
            outputs[:, heads.values(query_head)] = found.astype(outputs.dtype)


def _arrays(problem: WindowVerifyProblem, window: AttentionWindowPlan) -> WindowVerifyInputs:
    state, weights = problem.state, problem.weights
    clock = pair_clock(problem, window)
    keys, values = problem.sinks_and_nodes()
    return WindowVerifyInputs(
        queries=flatten_heads(problem.queries),
        keys=flatten_heads(keys),
        values=flatten_heads(values),
        ring_keys=flatten_heads(state.keys.astype(problem.keys.dtype)),
        ring_values=flatten_heads(state.values.astype(problem.values.dtype)),
        memory=jnp.swapaxes(state.memory, 2, 3),
        pairs=node_pairs(problem, window),
        clock=None if clock is None else clock[:, :, None],
        query_map=weights.queries,
        key_map=weights.keys,
        query_bias=None if weights.query_bias is None else weights.query_bias[:, None],
        key_bias=None if weights.key_bias is None else weights.key_bias[:, None],
    )


def _specs(arrays: WindowVerifyInputs, heads: ProgramHeads) -> WindowVerifyInputs:
    key, value = heads.together * heads.key_size, heads.together * heads.value_size

    def by_head(array: Array | None, count: int) -> pl.BlockSpec | None:
        """Some heads of `[H, ...]`."""
        return None if array is None else pl.BlockSpec((count, *array.shape[1:]), lambda b, k, *_: (k, 0, 0))

    def of_row(array: Array | None) -> pl.BlockSpec | None:
        """Some heads of a row of `[B, K, ...]`."""
        if array is None:
            return None
        return pl.BlockSpec((None, heads.together, *array.shape[2:]), lambda b, k, *_: (b, k, 0, 0))

    asked = heads.together * heads.share
    return WindowVerifyInputs(
        queries=all_rows(arrays.queries.shape[1], heads.share * key),
        keys=all_rows(arrays.keys.shape[1], key),
        values=all_rows(arrays.values.shape[1], value),
        ring_keys=all_rows(arrays.ring_keys.shape[1], key),
        ring_values=all_rows(arrays.ring_values.shape[1], value),
        memory=of_row(arrays.memory),
        pairs=pl.BlockSpec((None, *arrays.pairs.shape[1:]), lambda b, k, *_: (b, 0, 0)),
        clock=of_row(arrays.clock),
        query_map=by_head(arrays.query_map, asked),
        key_map=by_head(arrays.key_map, heads.together),
        query_bias=by_head(arrays.query_bias, asked),
        key_bias=by_head(arrays.key_bias, heads.together),
    )
