"""Verification of a draft tree on GPU: one Triton program for a row, a query head, some nodes and some columns."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.gpu.launch import kernels_of, launch
from pallas_kernels.tiles import next_power, tiles_for
from pallas_kernels.tree_verify.problem import VerifyProblem, branches, convolution_matrices

KERNELS = "pallas_kernels.tree_verify.gpu_kernels"


def verify(
    problem: VerifyProblem, *, unit_inputs: bool, local: bool, interpret: bool = False
) -> Float[Array, "B N H E"]:
    """Outputs of the nodes."""
    state, values = problem.state, problem.values
    batch, nodes, heads, size = problem.queries.shape
    kv_heads, value_size = values.shape[2:]
    tiles = tiles_for("tree_verify", size, value_size, values.dtype)
    together, parts = min(tiles.rows, next_power(nodes)), -(-value_size // tiles.part)
    nothing = jnp.zeros((1,), values.dtype)
    window = into = among = nothing
    width = 0
    if problem.taps is not None:
        into, among = convolution_matrices(problem.taps.astype(values.dtype), problem.tree)
        if state.window is not None and state.window.shape[1] > 0:
            window, width = state.window.astype(values.dtype), state.window.shape[1]
    alpha, memory = (
        jnp.zeros((1,)) if each is None else each.astype(jnp.float32) for each in (problem.alpha, state.memory)
    )
    (outputs,) = launch(
        kernels_of(KERNELS, interpret).verify_kernel,
        (
            problem.queries,
            problem.keys,
            values,
            state.keys.astype(problem.keys.dtype),
            state.values.astype(values.dtype),
            memory,
            alpha,
            branches(problem),
            window,
            into,
            among,
            nodes,
        ),
        (jax.ShapeDtypeStruct((batch, nodes, heads, value_size), values.dtype),),
        grid=(-(-nodes // together) * parts, heads, batch),
        constants={
            "HEADS": heads,
            "SHARE": heads // kv_heads,
            "D": size,
            "E": value_size,
            "WIDE_D": next_power(size),
            "PART_D": tiles.piece,
            "PART_E": tiles.part,
            "PARTS": parts,
            "GROUP": state.keys.shape[1],
            "WINDOW": width,
            "WIDE_WINDOW": next_power(width),
            "TILE": min(tiles.rows, next_power(state.keys.shape[1])),
            "NODES": together,
            "LOCAL": local,
            "GROUPED": problem.alpha is not None,
            "FILTERED": problem.taps is not None,
            "OWN_TREES": among.ndim == 4,
            "UNIT": unit_inputs,
        },
        warps=tiles.warps,
        stages=tiles.stages,
        interpret=interpret,
    )
    return outputs
