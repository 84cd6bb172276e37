"""Verification by a window and a memory on GPU: a Triton program for a row, a query head and some nodes."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.gpu.launch import kernels_of, launch
from pallas_kernels.tiles import next_power, tiles_for
from pallas_kernels.window_verify.problem import WindowVerifyProblem, node_pairs, pair_clock
from pallas_kernels.windowed_attention.problem import AttentionWindowPlan

KERNELS = "pallas_kernels.window_verify.gpu_kernels"


def verify(
    problem: WindowVerifyProblem, window: AttentionWindowPlan, *, interpret: bool = False
) -> Float[Array, "B N H E"]:
    """Outputs of the nodes."""
    state, values, weights = problem.state, problem.values, problem.weights
    batch, nodes, heads, size = problem.queries.shape
    kv_heads, value_size = values.shape[2:]
    tiles = tiles_for("window_verify", size, value_size, values.dtype)
    together, parts = min(tiles.rows, next_power(nodes)), -(-value_size // tiles.part)
    directions = weights.keys.shape[1]
    hedgehog = window.features == "hedgehog"
    clock = pair_clock(problem, window)
    nothing = jnp.zeros((1,))

    def bias(found: Array | None, count: int) -> Array:
        """Biases that the kernel reads: zeros where `exponential` has none."""
        if hedgehog:
            return nothing
        return jnp.zeros((count, directions)) if found is None else found.astype(jnp.float32)

    (outputs,) = launch(
        kernels_of(KERNELS, interpret).window_verify_kernel,
        (
            problem.queries,
            problem.keys,
            values,
            state.keys.astype(problem.keys.dtype),
            state.values.astype(values.dtype),
            state.memory,
            weights.queries,
            weights.keys,
            bias(weights.query_bias, heads),
            bias(weights.key_bias, kv_heads),
            problem.balance,
            node_pairs(problem, window),
            nothing if clock is None else clock,
            nodes,
        ),
        (jax.ShapeDtypeStruct((batch, nodes, heads, value_size), values.dtype),),
        grid=(-(-nodes // together) * parts, heads, batch),
        constants={
            "HEADS": heads,
            "SHARE": heads // kv_heads,
            "D": size,
            "E": value_size,
            "M": problem.features,
            "DIRECTIONS": directions,
            "WIDE_D": next_power(size),
            "WIDE_M": next_power(directions),
            "PART_M": min(tiles.piece, next_power(directions)),
            "PART_E": tiles.part,
            "PARTS": parts,
            "RING": state.keys.shape[1],
            "TILE": tiles.rows,
            "NODES": together,
            "SCALE": window.scale,
            "ROOT": math.sqrt(window.scale),
            "NORMAL": math.log(directions) / 2,
            "HEDGEHOG": hedgehog,
            "DECAYED": clock is not None,
        },
        warps=tiles.warps,
        stages=tiles.stages,
        interpret=interpret,
    )
    return outputs
