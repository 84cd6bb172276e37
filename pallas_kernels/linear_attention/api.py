"""Linear attention as one operation: `o_t = q_t·S_t`, `S_t = decay S_{t-1} + k_t v_t`, normalised if asked for."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.implementations import choose_implementation
from pallas_kernels.linear_attention import gpu, tpu, xla
from pallas_kernels.linear_attention.problem import LinearPlan, LinearProblem, Memory
from pallas_kernels.obstacles import obstacles_of, unlike_types
from pallas_kernels.over_devices import over_devices
from pallas_kernels.precision import accumulation_dtype

_Returned = tuple[Float[Array, "B T H E"], Memory]


def linear_attention(
    queries: Float[Array, "B T H D"],
    keys: Float[Array, "B T K D"],
    values: Float[Array, "B T K E"],
    *,
    decay: Float[Array, " K"] | None = None,
    floor: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    start: Memory | None = None,
    implementation: str | Sequence[str] | None = None,
) -> _Returned:
    """Causal linear attention over whole rows, and the memory after them.

    `o_t = sum_{s<=t} decay^(t-s) (q_t·k_s) v_s`, with a floor divided by `max(floor, sum decay^(t-s) q_t·k_s)`: what
    Katharopoulos et al. (2020), Performer and others compute from features, and with a decay the retention of RetNet
    (Sun et al. 2023) and Lightning Attention. It can be differentiated in queries, keys, values and start.

    Args:
        queries: `[B, T, H, D]`, as the feature map left them, bfloat16 or float32 (XLA: float64 too).
        keys: `[B, T, K, D]`; H is a multiple of K.
        values: `[B, T, K, E]`.
        decay: `[K]` above 0 and up to 1, a constant; None for 1.
        floor: least divisor of sums. 0 divides by the sum of the weights whatever it is, unless it is zero;
            None does not divide.
        segment_ids: `[B, T]` number of each token's document, side by side, 0 for padding; None for whole rows.
        start: the memory before the rows, of their first document; None for nothing.
        implementation: `xla`, `tpu`, `gpu`, `tpu_interpreted` or `gpu_interpreted` (anywhere, slow, for tests), several
            in order of preference, or None for what suits the platform, the types and the shapes.

    Returns:
        outputs `[B, T, H, E]` in the type of the values, and the memory after the last token that is there.

    Raises:
        UnsupportedError: the implementation that was asked for cannot run here or with these shapes.
        ValueError: shapes do not fit each other.
    """
    _check(queries, keys, values, decay, floor)
    wide = accumulation_dtype(values.dtype)
    if start is None:
        batch, _, kv_heads, size = keys.shape
        start = Memory(
            jnp.zeros((batch, kv_heads, size, values.shape[3]), wide), jnp.zeros((batch, kv_heads, size), wide)
        )
    start = Memory(*(each.astype(wide) for each in start))
    log_decay = None if decay is None else jax.lax.stop_gradient(jnp.log(decay.astype(wide)))
    problem = LinearProblem(queries, keys, values, log_decay, segment_ids, start)
    unlike = unlike_types(queries, keys, values)
    obstacles = obstacles_of(IMPLEMENTATIONS, "linear_attention.outputs", keys, values, programs=unlike)
    name = choose_implementation("linear_attention", implementation, obstacles)
    return IMPLEMENTATIONS[name](problem, floor)


def _xla(problem: LinearProblem, floor: float | None) -> _Returned:
    length = problem.queries.shape[1]
    return xla.forward(problem, LinearPlan(min(xla.BLOCK, length), length, floor))


def _programs(problem: LinearProblem, floor: float | None, *, platform: str, interpret: bool) -> _Returned:
    def run(problem: LinearProblem) -> _Returned:
        return _program(problem, PROGRAMS[platform].plan_for(problem, floor), platform, interpret)

    batch, kv_heads = problem.keys.shape[0], problem.keys.shape[2]
    return over_devices(run, problem, DIMENSIONS, ("bthe", Memory._make(["bkde", "bkd"])), rows=batch, heads=kv_heads)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _program(problem: LinearProblem, plan: LinearPlan, platform: str, interpret: bool) -> _Returned:
    result = PROGRAMS[platform].forward(problem, plan, interpret=interpret)
    return result.outputs, result.after


def _forward(problem: LinearProblem, plan: LinearPlan, platform: str, interpret: bool) -> tuple[_Returned, Any]:
    result = PROGRAMS[platform].forward(problem, plan, differentiated=True, interpret=interpret)
    return (result.outputs, result.after), (problem, result)


def _backward(
    plan: LinearPlan, platform: str, interpret: bool, residuals: Any, cotangents: _Returned
) -> tuple[LinearProblem]:
    problem, result = residuals
    found = PROGRAMS[platform].backward(problem, plan, result, *cotangents, interpret=interpret)
    nothing: Any = None if problem.segment_ids is None else np.zeros(problem.segment_ids.shape, jax.dtypes.float0)
    return (
        LinearProblem(
            found.queries,
            found.keys,
            found.values,
            None if problem.log_decay is None else jnp.zeros_like(problem.log_decay),
            nothing,
            found.start,
        ),
    )


_program.defvjp(_forward, _backward)

# What lies along rows (b) and heads (h, k), on a mesh.
DIMENSIONS = LinearProblem._make(["bthd", "btkd", "btke", "k", "bt", Memory._make(["bkde", "bkd"])])
# Modules with `plan_for`, `forward` and `backward`.
PROGRAMS: dict[str, Any] = {"tpu": tpu, "gpu": gpu}
IMPLEMENTATIONS: dict[str, Any] = {"xla": _xla} | {
    f"{platform}_interpreted" if interpret else platform: partial(_programs, platform=platform, interpret=interpret)
    for platform in PROGRAMS
    for interpret in (False, True)
}


def _check(queries: Array, keys: Array, values: Array, decay: Array | None, floor: float | None) -> None:
    if keys.shape[:3] != values.shape[:3] or queries.shape[:2] != keys.shape[:2] or queries.shape[3] != keys.shape[3]:
        raise ValueError(f"queries {queries.shape}, keys {keys.shape} and values {values.shape} do not fit each other")
    if queries.shape[2] % keys.shape[2]:
        raise ValueError(f"{queries.shape[2]} query heads are no multiple of {keys.shape[2]} key/value heads")
    if decay is not None and decay.shape != (keys.shape[2],):
        raise ValueError(
            f"decay has the shape {decay.shape}; give a number for each of {keys.shape[2]} key/value heads"
        )
    if floor is not None and floor < 0:
        raise ValueError(f"floor is {floor}; give 0 or more")
