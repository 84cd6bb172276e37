"""Attention over a window and a linear memory of what lies before it, under one normaliser, as one operation."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.augmented_attention.problem import PackedRows
from pallas_kernels.implementations import choose_implementation
from pallas_kernels.linear_attention.problem import Memory
from pallas_kernels.obstacles import obstacles_of, unlike_types
from pallas_kernels.over_devices import over_devices
from pallas_kernels.precision import accumulation_dtype
from pallas_kernels.tiles import SIZES
from pallas_kernels.windowed_attention import gpu, tpu, xla
from pallas_kernels.windowed_attention.problem import (
    FEATURES,
    AttentionWindowPlan,
    Features,
    FeatureWeights,
    WindowedPlan,
    WindowedPrior,
    WindowedProblem,
)
from pallas_kernels.windows.rows import Sinks, TokenPlaces, WindowNodes
from pallas_kernels.windows.sinks import add_sinks

_Returned = tuple[Float[Array, "B T H E"], Memory]
# The same, and the logarithms of the sums of weights, which are None without sinks.
_Computed = tuple[Float[Array, "B T H E"], Memory, Float[Array, "B H T"] | None]


def windowed_attention(
    queries: Float[Array, "B T H D"],
    keys: Float[Array, "B T K D"],
    values: Float[Array, "B T K E"],
    weights: FeatureWeights,
    *,
    features: Features,
    group_size: int = 64,
    groups: int = 1,
    tokens: int | None = None,
    sinks: int = 0,
    scale: float,
    balance: Float[Array, " H"] | None = None,
    log_decays: Float[Array, "B T K"] | None = None,
    packed: PackedRows | None = None,
    prior: WindowedPrior | None = None,
    implementation: str | Sequence[str] | None = None,
) -> _Returned:
    """Outputs in one pass over queries, keys and values, and the memory after the rows.

    `o_t = (sum_{s near} e^{scale q_t·k_s} v_s + e^b sum_{s far} phi(q_t)·phi(k_s) d_ts v_s) / (the same sums of ones)`
    with `d_ts = prod_{s<r<=t} a_r` (LoLCATs, Zhang et al. 2025; Based, Arora et al. 2024). Features are taken inside:
    `hedgehog` is `softmax([W x, -W x])` (Zhang et al. 2024), `exponential` is
    `exp(scale^0.5 W x + b - scale |x|^2 / 2) / m^0.5` (Choromanski et al. 2021), keys' exponents capped at 40. It can
    be differentiated in everything that is a float.

    Args:
        queries: `[B, T, H, D]`, bfloat16 or float32 (XLA: float64 too).
        keys: `[B, T, K, D]`; H is a multiple of K.
        values: `[B, T, K, E]`.
        weights: the feature map's learnt parts; m features, twice as many with `hedgehog`.
        features: `exponential` or `hedgehog`.
        group_size: tokens of a group, by position.
        groups: groups before the query's own that its window holds.
        tokens: a window of exactly so many tokens instead, the query's own included.
        sinks: tokens at the beginning of each document that are near for ever (Xiao et al. 2024), beside the window,
            and never far.
        scale: factor of q·k.
        balance: `[H]` logarithm b of the memory's factor; None for zero.
        log_decays: `[B, T, K]` logarithms of each token's decay `a`, not positive; None for no decay.
        packed: segment ids and positions of rows with several documents or padding; None for whole rows from 0 on.
        prior: context before the rows; it needs `packed`.
        implementation: `xla`, `tpu`, `gpu`, `tpu_interpreted` or `gpu_interpreted` (anywhere, slow, for tests), several
            in order of preference, or None for what suits the platform, the types and the shapes.

    Returns:
        outputs `[B, T, H, E]` in the type of the values, and the memory, float32 or better, of the last document's
        tokens before the window of the query after the rows, `[B, K, M, E]` and `[B, K, M]`, decayed up to the last of
        them. Without `packed` the memory has no meaning.

    Raises:
        UnsupportedError: the implementation that was asked for cannot run here or with these types.
        ValueError: shapes do not fit each other.
    """
    _check(queries, keys, values, weights, features, packed, prior)
    window = AttentionWindowPlan(tokens, group_size, groups, scale, features, sinks)
    _check_window(window, prior)
    size = weights.keys.shape[1] * (2 if features == "hedgehog" else 1)
    name = windowed_implementation(queries, keys, values, size, implementation)
    wide = accumulation_dtype(values.dtype)
    balance = jnp.zeros((queries.shape[2],), wide) if balance is None else balance.astype(wide)
    decays = None if log_decays is None else log_decays.astype(wide)
    own = jax.tree.map(lambda each: each.astype(wide), weights)
    return IMPLEMENTATIONS[name](WindowedProblem(queries, keys, values, own, balance, decays, packed, prior), window)


def windowed_implementation(
    queries: Array,
    keys: Array,
    values: Array,
    size: int,
    asked: str | Sequence[str] | None,
) -> str:
    """The name of the implementation to run.

    Args:
        queries: as in `windowed_attention`.
        keys: likewise.
        values: likewise.
        size: features M of a key.
        asked: an implementation, several in order of preference, or None for what suits the platform.

    Raises:
        UnsupportedError: none of those that were asked for can run.
    """
    unlike = unlike_types(queries, keys, values)
    many = f"{size} features are too many for it" if size > SIZES[-1] else None
    kernel = "windowed_attention.outputs"
    obstacles = obstacles_of(IMPLEMENTATIONS, kernel, keys, values, programs=unlike, triton=many)
    return choose_implementation("windowed_attention", asked, obstacles)


def _linear(weights: FeatureWeights, window: AttentionWindowPlan) -> FeatureWeights:
    """Weights with all that exponents are linear in."""
    if window.features == "hedgehog":
        both = (jnp.concatenate([each, -each], axis=1) for each in weights[:2])
        return FeatureWeights(*both)
    return weights._replace(**{name: getattr(weights, name) * math.sqrt(window.scale) for name in ("queries", "keys")})


def _programs(problem: WindowedProblem, window: AttentionWindowPlan, *, platform: str, interpret: bool) -> _Returned:
    early: Sinks | None = None
    if problem.prior is not None and problem.packed is not None:
        early = problem.prior.sinks(problem.packed)
        problem = problem._replace(prior=problem.prior.without_sinks(window.sinks))
    problem = problem._replace(weights=_linear(problem.weights, window))

    def run(problem: WindowedProblem) -> _Computed:
        plan = PROGRAMS[platform].plan_for(problem, window)
        if problem.prior is not None:
            problem = problem._replace(prior=problem.prior.of_length(plan.before))
        return _program(problem, plan, platform, interpret)

    batch, kv_heads = problem.keys.shape[0], problem.keys.shape[2]
    returned = "bthe", Memory._make(["bkde", "bkd"]), "bht" if window.sinks else None
    outputs, after, totals = over_devices(run, problem, DIMENSIONS, returned, rows=batch, heads=kv_heads)
    if totals is not None:
        outputs = _with_sinks(problem, early, outputs, totals, window)
    return outputs, after


def _with_sinks(
    problem: WindowedProblem, early: Sinks | None, outputs: Array, totals: Array, window: AttentionWindowPlan
) -> Float[Array, "B T H E"]:
    packed, places = problem.packed, TokenPlaces.whole(problem.queries.shape[1])
    if packed is not None:
        places = TokenPlaces(packed.segment_ids, packed.segment_ids, packed.positions, packed.first, aligned=False)
    tokens = WindowNodes(problem.keys, problem.values, None)
    parts = places, early, outputs, totals
    return add_sinks(problem.queries, tokens, *parts, sinks=window.sinks, scale=window.scale)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _program(problem: WindowedProblem, plan: WindowedPlan, platform: str, interpret: bool) -> _Computed:
    result = PROGRAMS[platform].forward(problem, plan, interpret=interpret)
    return result.outputs, result.after, result.totals


def _forward(problem: WindowedProblem, plan: WindowedPlan, platform: str, interpret: bool) -> tuple[_Computed, Any]:
    result = PROGRAMS[platform].forward(problem, plan, differentiated=True, interpret=interpret)
    return (result.outputs, result.after, result.totals), (problem, result.before)


def _backward(
    plan: WindowedPlan, platform: str, interpret: bool, residuals: Any, cotangents: _Computed
) -> tuple[WindowedProblem]:
    problem, before = residuals
    found = PROGRAMS[platform].backward(problem, plan, before, *cotangents, interpret=interpret)
    prior = None
    if problem.prior is not None and found.prior is not None:
        like = problem.prior[:4]
        memory, keys, values, decays = jax.tree.map(lambda grad, own: grad.astype(own.dtype), found.prior, like)
        prior = WindowedPrior(memory, keys, values, decays, _no_gradient(problem.prior.positions))
    packed = None if problem.packed is None else jax.tree.map(_no_gradient, problem.packed)
    rows = found.queries, found.keys, found.values
    return (WindowedProblem(*rows, found.weights, found.balance, found.log_decays, packed, prior),)


_program.defvjp(_forward, _backward)

# What lies along rows (b) and heads (h, k), on a mesh.
DIMENSIONS = WindowedProblem._make(
    [
        *("bthd", "btkd", "btke"),
        FeatureWeights._make(["hmd", "kmd", "hm", "km"]),
        *("h", "btk"),
        PackedRows._make(["bt", "bt", "b", "b", "b"]),
        WindowedPrior._make([Memory._make(["bkde", "bkd"]), "bpkd", "bpke", "bpk", "bp", "bskd", "bske"]),
    ]
)
# Modules with `plan_for`, `forward` and `backward`.
PROGRAMS: dict[str, Any] = {"tpu": tpu, "gpu": gpu}
IMPLEMENTATIONS: dict[str, Any] = {"xla": xla.forward} | {
    f"{platform}_interpreted" if interpret else platform: partial(_programs, platform=platform, interpret=interpret)
    for platform in PROGRAMS
    for interpret in (False, True)
}


def _no_gradient(numbers: Array) -> Any:
    return np.zeros(numbers.shape, jax.dtypes.float0)


def _check(
    queries: Array,
    keys: Array,
    values: Array,
    weights: FeatureWeights,
    features: str,
    packed: PackedRows | None,
    prior: WindowedPrior | None,
) -> None:
    if keys.shape[:3] != values.shape[:3] or queries.shape[:2] != keys.shape[:2] or queries.shape[3] != keys.shape[3]:
        raise ValueError(f"queries {queries.shape}, keys {keys.shape} and values {values.shape} do not fit each other")
    if queries.shape[2] % keys.shape[2]:
        raise ValueError(f"{queries.shape[2]} query heads are no multiple of {keys.shape[2]} key/value heads")
    if features not in FEATURES:
        raise ValueError(f"features is '{features}'; choose one of {', '.join(FEATURES)}")
    for name, rows in (("queries", queries), ("keys", keys)):
        found = getattr(weights, name).shape
        if (found[0], found[2]) != rows.shape[2:]:
            raise ValueError(f"weights.{name} has the shape {found}; give [{rows.shape[2]}, m, {rows.shape[3]}]")
    if prior is not None and packed is None:
        raise ValueError("a prior context needs packed rows: positions go on from it; give packed")


def _check_window(window: AttentionWindowPlan, prior: WindowedPrior | None) -> None:
    if window.tokens is not None and window.tokens < 1:
        raise ValueError(f"tokens is {window.tokens}; give at least 1, the query's own token")
    if window.sinks < 0:
        raise ValueError(f"sinks is {window.sinks}; give zero or more")
    have = 0 if prior is None or prior.sink_keys is None else prior.sink_keys.shape[1]
    if prior is not None and have != window.sinks:
        raise ValueError(f"the prior context has {have} sinks, and sinks is {window.sinks}; give as many in both")
