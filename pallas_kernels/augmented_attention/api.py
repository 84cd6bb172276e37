"""Augmented linear attention as one operation: local + alpha * grouped + convolution (You et al., ICML 2024)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.augmented_attention import gpu, tpu, xla
from pallas_kernels.augmented_attention.problem import AugmentedPlan, AugmentedProblem, PackedRows, PriorContext
from pallas_kernels.implementations import choose_implementation
from pallas_kernels.obstacles import obstacles_of, unlike_types
from pallas_kernels.over_devices import over_devices

_Returned = tuple[Float[Array, "B T H E"], Float[Array, "B K D E"]]


def augmented_attention(
    queries: Float[Array, "B T H D"],
    keys: Float[Array, "B T K D"],
    values: Float[Array, "B T K E"],
    *,
    group_size: int,
    alpha: Float[Array, " H"] | None = None,
    taps: Float[Array, "H W"] | None = None,
    local: bool = True,
    unit: bool = True,
    packed: PackedRows | None = None,
    prior: PriorContext | None = None,
    implementation: str | Sequence[str] | None = None,
) -> _Returned:
    """Outputs of all three branches in one pass over queries, keys and values, and the memory after the rows.

    `o_t = sum relu(q_t·k_s)^2 v_s + alpha sum (q_t·k_s) v_s + sum_{j<W} w_j v_{t-j}`: the first sum is over the tokens
    of t's group up to t, the second over earlier groups. It can be differentiated in everything that is a float.

    Args:
        queries: `[B, T, H, D]`, bfloat16 or float32 (XLA: float64 too).
        keys: `[B, T, K, D]`; H is a multiple of K.
        values: `[B, T, K, E]`.
        group_size: tokens G in a group.
        alpha: `[H]` factor of the grouped branch; None leaves the branch out.
        taps: `[H, W]` of the convolution, lag 0 first; None leaves it out.
        local: whether there is a local branch.
        unit: scale queries and keys to length one.
        packed: segment ids and positions of rows with several documents or padding; None for whole rows from 0 on.
        prior: context before the rows; it needs `packed`.
        implementation: `xla`, `tpu`, `gpu`, `tpu_interpreted` or `gpu_interpreted` (anywhere, slow, for tests), several
            in order of preference, or None for what suits the platform, the types and the shapes.

    Returns:
        outputs `[B, T, H, E]` in the type of the values, and the memory `[B, K, D, E]` of all finished groups of the
        last document, in float32 or better. Without `packed` the memory has no meaning.

    Raises:
        UnsupportedError: the implementation that was asked for cannot run here or with these shapes.
        ValueError: shapes do not fit each other.
    """
    problem = AugmentedProblem(queries, keys, values, alpha, taps, packed, prior)
    _check(problem, group_size)
    unlike = unlike_types(queries, keys, values)
    obstacles = obstacles_of(IMPLEMENTATIONS, "augmented_attention.outputs", keys, values, programs=unlike)
    name = choose_implementation("augmented_attention", implementation, obstacles)
    return IMPLEMENTATIONS[name](problem, group_size, unit, local)


def _xla(problem: AugmentedProblem, group: int, unit: bool, local: bool) -> _Returned:
    plan = xla.plan_for(problem, group=group, unit=unit, local=local)
    return xla.forward(_fitted(problem, plan), plan)


def _programs(
    problem: AugmentedProblem, group: int, unit: bool, local: bool, *, platform: str, interpret: bool
) -> _Returned:
    def run(problem: AugmentedProblem) -> _Returned:
        plan = PROGRAMS[platform].plan_for(problem, group=group, unit=unit, local=local)
        return _program(_fitted(problem, plan), plan, platform, interpret)

    batch, kv_heads = problem.keys.shape[0], problem.keys.shape[2]
    return over_devices(run, problem, DIMENSIONS, ("bthe", "bkde"), rows=batch, heads=kv_heads)


def _fitted(problem: AugmentedProblem, plan: AugmentedPlan) -> AugmentedProblem:
    """The problem with a prior context of the length that its windows need."""
    return problem if problem.prior is None else problem._replace(prior=problem.prior.of_length(plan.before))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _program(problem: AugmentedProblem, plan: AugmentedPlan, platform: str, interpret: bool) -> _Returned:
    result = PROGRAMS[platform].forward(problem, plan, interpret=interpret)
    return result.outputs, result.after


def _forward(
    problem: AugmentedProblem, plan: AugmentedPlan, platform: str, interpret: bool
) -> tuple[_Returned, tuple[AugmentedProblem, Float[Array, "B n K D E"]]]:
    result = PROGRAMS[platform].forward(problem, plan, differentiated=True, interpret=interpret)
    return (result.outputs, result.after), (problem, result.before)


def _backward(
    plan: AugmentedPlan, platform: str, interpret: bool, residuals: Any, cotangents: _Returned
) -> tuple[AugmentedProblem]:
    problem, before = residuals
    found = PROGRAMS[platform].backward(problem, plan, before, *cotangents, interpret=interpret)
    prior = None
    if problem.prior is not None and found.prior is not None:
        memory, keys, values = (
            grad.astype(like.dtype) for grad, like in zip(found.prior, problem.prior[:3], strict=True)
        )
        nothing = _no_gradient(problem.prior.positions)
        prior = PriorContext(memory, keys, values, nothing, nothing)
    return (
        AugmentedProblem(
            found.queries,
            found.keys,
            found.values,
            None if problem.alpha is None or found.alpha is None else found.alpha.astype(problem.alpha.dtype),
            None if problem.taps is None or found.taps is None else found.taps.astype(problem.taps.dtype),
            None if problem.packed is None else jax.tree.map(_no_gradient, problem.packed),
            prior,
        ),
    )


_program.defvjp(_forward, _backward)

# What lies along rows (b) and heads (h, k), on a mesh.
DIMENSIONS = AugmentedProblem._make(
    [
        *("bthd", "btkd", "btke", "h", "hw"),
        PackedRows._make(["bt", "bt", "b", "b", "b"]),
        PriorContext._make(["bkde", "bpkd", "bpke", "bp", "bp"]),
    ]
)
# Modules with `plan_for`, `forward` and `backward`.
PROGRAMS: dict[str, Any] = {"tpu": tpu, "gpu": gpu}
IMPLEMENTATIONS: dict[str, Any] = {"xla": _xla} | {
    f"{platform}_interpreted" if interpret else platform: partial(_programs, platform=platform, interpret=interpret)
    for platform in PROGRAMS
    for interpret in (False, True)
}


def _no_gradient(numbers: Array) -> Any:
    return np.zeros(numbers.shape, jax.dtypes.float0)


def _check(problem: AugmentedProblem, group_size: int) -> None:
    queries, keys, values = problem.queries, problem.keys, problem.values
    if keys.shape[:3] != values.shape[:3] or queries.shape[:2] != keys.shape[:2] or queries.shape[3] != keys.shape[3]:
        raise ValueError(f"queries {queries.shape}, keys {keys.shape} and values {values.shape} do not fit each other")
    if queries.shape[2] % keys.shape[2]:
        raise ValueError(f"{queries.shape[2]} query heads are no multiple of {keys.shape[2]} key/value heads")
    if group_size < 1:
        raise ValueError(f"group_size is {group_size}; give a positive number")
    if problem.prior is not None and problem.packed is None:
        raise ValueError("a prior context needs packed rows: positions go on from it; give packed")
    for name, array in (("alpha", problem.alpha), ("taps", problem.taps)):
        if array is not None and array.shape[0] != queries.shape[2]:
            raise ValueError(f"{name} has {array.shape[0]} heads, queries have {queries.shape[2]}")
