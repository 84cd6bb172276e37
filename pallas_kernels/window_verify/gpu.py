"""Verification by a window and a memory on GPU: features by one Triton kernel, outputs of the nodes by another.

Features of queries are computed once for all columns of values, those of keys once for the query heads that share them,
and only where a node stands beyond the window that they are in.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.gpu.launch import kernels_of, launch
from pallas_kernels.tiles import Tiles, next_power, tiles_for
from pallas_kernels.window_verify.problem import FAR, WindowVerifyProblem, node_pairs, pair_clock
from pallas_kernels.windowed_attention.problem import AttentionWindowPlan

KERNELS = "pallas_kernels.window_verify.gpu_kernels"


def verify(
    problem: WindowVerifyProblem, window: AttentionWindowPlan, *, interpret: bool = False
) -> Float[Array, "B N H E"]:
    """Outputs of the nodes."""
    state, weights = problem.state, problem.weights
    batch, nodes, heads, size = problem.queries.shape
    kv_heads, value_size = problem.values.shape[2:]
    tiles = tiles_for("window_verify", size, value_size, problem.values.dtype)
    together, parts = min(tiles.rows, next_power(nodes)), -(-value_size // tiles.part)
    keys, values = problem.sinks_and_nodes()
    ring_keys, ring_values = state.keys.astype(keys.dtype), state.values.astype(values.dtype)
    pairs, clock = node_pairs(problem, window), pair_clock(problem, window)
    call = _Features(window, tiles, interpret)
    nothing = jnp.zeros((1,), jnp.int32)
    asked, scales = call.of(problem.queries, problem.queries[:, :0], weights.queries, weights.query_bias, nothing)
    crossed = jnp.any(pairs == FAR, axis=1).astype(jnp.int32)
    features, _ = call.of(keys, ring_keys, weights.keys, weights.key_bias, crossed, queries=False)
    (outputs,) = launch(
        kernels_of(KERNELS, interpret).window_verify_kernel,
        (
            problem.queries,
            keys,
            values,
            ring_keys,
            ring_values,
            state.memory,
            asked,
            features,
            scales,
            problem.balance,
            pairs,
            jnp.zeros((1,)) if clock is None else clock,
            nodes,
            keys.shape[1],
        ),
        (jax.ShapeDtypeStruct((batch, nodes, heads, value_size), values.dtype),),
        grid=(-(-nodes // together) * parts, heads, batch),
        constants={
            "HEADS": heads,
            "SHARE": heads // kv_heads,
            "D": size,
            "E": value_size,
            "M": problem.features,
            "PART_D": min(tiles.piece, next_power(size)),
            "PART_M": min(tiles.piece, next_power(problem.features)),
            "PART_E": tiles.part,
            "PARTS": parts,
            "RING": ring_keys.shape[1],
            "TILE": tiles.rows,
            "NODES": together,
            "SCALE": window.scale,
            "DECAYED": clock is not None,
        },
        warps=tiles.warps,
        stages=tiles.stages,
        interpret=interpret,
    )
    return outputs


class _Features(NamedTuple):
    """The feature map of a window, made ready for its kernel."""

    window: AttentionWindowPlan
    tiles: Tiles
    interpret: bool

    def of(
        self,
        rows: Float[Array, "B N h D"],
        ring: Float[Array, "B C h D"],
        weights: Float[Array, "h m D"],
        bias: Float[Array, "h m"] | None,
        crossed: Int[Array, "..."],
        *,
        queries: bool = True,
    ) -> tuple[Float[Array, "B C_N h M"], Float[Array, "B h N"]]:
        """Features of rows, of a ring's before them, and the logarithms of what queries' were divided by.

        Of keys, the logarithms have no meaning, and features only where some row of a tile is `crossed` (`[B, C + N]`).
        """
        batch, count, heads, size = rows.shape
        directions, before = weights.shape[1], ring.shape[1]
        hedgehog = self.window.features == "hedgehog"
        tiles = self.tiles
        if bias is None:
            # The kernel reads zeros where `exponential` has none, and nothing with Hedgehog.
            bias = jnp.zeros((1, 1) if hedgehog else (heads, directions))
        outputs: list[Any] = [
            jax.ShapeDtypeStruct((batch, before + count, heads, directions * (1 + hedgehog)), rows.dtype),
            jax.ShapeDtypeStruct((batch, heads, count) if queries else (1,), jnp.float32),
        ]
        features, scales = launch(
            kernels_of(KERNELS, self.interpret).window_features_kernel,
            (rows, ring if before else rows, weights, bias.astype(jnp.float32), crossed, count),
            outputs,
            grid=(-(-(before + count) // tiles.rows), heads, batch),
            constants={
                "HEADS": heads,
                "D": size,
                "PART_D": min(tiles.piece, next_power(size)),
                "DIRECTIONS": directions,
                "PART_M": min(tiles.piece, next_power(directions)),
                "RING": before,
                "TILE": tiles.rows,
                "SCALE": self.window.scale,
                "ROOT": math.sqrt(self.window.scale),
                "NORMAL": math.log(directions) / 2,
                "HEDGEHOG": hedgehog,
                "QUERIES": queries,
            },
            warps=tiles.warps,
            stages=tiles.stages,
            interpret=self.interpret,
        )
        return features, scales
