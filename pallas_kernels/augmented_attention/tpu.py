"""Augmented linear attention on TPU: three Pallas programs, forward, backward in order and backward in reverse.

Heads stay where projections leave them, side by side in the last axis: a program takes as many of them as fill 128
lanes. Rows are not padded: the last block of a row reads beyond its end and masks what it finds there.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.augmented_attention.tpu_kernels import (
    Carried,
    Inputs,
    KeyGradients,
    Plan,
    QueryGradients,
    Scalars,
    forward_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
)

LANES = 128
VMEM_BYTES = 64 * 2**20


class Placement(NamedTuple):
    """Where tokens stand in rows that hold several documents, or that go on from a state.

    Attributes:
        documents: `[B, T]` document of each token, equal numbers side by side, 0 for padding.
        positions: `[B, T]` position of each token in its document.
        first: `[B]` the document that the row begins with, of which the memory speaks.
        last: `[B]` the document that the row ends with, of which the memory after the row speaks.
        count: `[B]` tokens of the last document so far.
    """

    documents: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    first: Int[Array, " B"]
    last: Int[Array, " B"]
    count: Int[Array, " B"]


class Start(NamedTuple):
    """What came before the row.

    Attributes:
        memory: `[B, K, D, E]` float32.
        keys: `[B, P, K, D]` of the tokens just before the row, the last one last.
        values: `[B, P, K, E]`.
        positions: `[B, P]` of these tokens, -1 where there is none.
        known: `[B, P]` whether the memory holds the token.
    """

    memory: Float[Array, "B K D E"]
    keys: Float[Array, "B P K D"]
    values: Float[Array, "B P K E"]
    positions: Int[Array, "B P"]
    known: Int[Array, "B P"]


class Problem(NamedTuple):
    """What all three programs read, before it is cut into blocks."""

    queries: Float[Array, "B T H D"]
    keys: Float[Array, "B T K D"]
    values: Float[Array, "B T K E"]
    alpha: Float[Array, " H"]
    taps: Float[Array, "H W"] | None
    placement: Placement | None
    start: Start | None


def window_before(group: int, width: int) -> int:
    """Rows P of a window before its block."""
    return -(-max(group, width - 1, 1) // LANES) * LANES


def plan_of(problem: Problem, *, group: int, unit: bool, local: bool, grouped: bool, block: int) -> Plan:
    """The plan of a problem; `block` is rounded up to a multiple of P."""
    _, length, heads, key_size = problem.queries.shape
    kv_heads, value_size = problem.values.shape[2:]
    before = window_before(group, 0 if problem.taps is None else problem.taps.shape[1])
    block = -(-min(block, length) // before) * before
    return Plan(
        group=group,
        before=before,
        block=block,
        blocks=-(-length // block),
        length=length,
        kv_heads=_heads_together(kv_heads, key_size, value_size),
        share=heads // kv_heads,
        key_size=key_size,
        value_size=value_size,
        unit=unit,
        local=local,
        grouped=grouped,
        convolved=problem.taps is not None,
    )


def _heads_together(kv_heads: int, key_size: int, value_size: int) -> int:
    """How many key/value heads fill whole lanes; all of them where no smaller number does."""
    together = math.lcm(*(LANES // math.gcd(LANES, size) for size in (key_size, value_size)))
    return together if kv_heads % together == 0 else kv_heads


def band_of(taps: Float[Array, "H W"], plan: Plan, dtype: Any) -> Float[Array, "H C M"]:
    """The convolution of a block as a matrix over its window."""
    lag = jnp.arange(plan.block)[:, None] + plan.before - jnp.arange(plan.before + plan.block)
    inside = (lag >= 0) & (lag < taps.shape[1])
    found = taps.astype(dtype)[:, jnp.clip(lag, 0, taps.shape[1] - 1)]
    return jnp.where(inside, found, 0)


def taps_of(band: Float[Array, "B H C M"], plan: Plan, width: int) -> Float[Array, "H W"]:
    """The gradient of the taps, given that of the matrix."""
    total = jnp.sum(band, axis=0)
    lag = jnp.arange(plan.block)[:, None] + plan.before - jnp.arange(plan.before + plan.block)
    place = jnp.where((lag >= 0) & (lag < width), lag, width)
    return jax.vmap(lambda part: jnp.zeros((width + 1,), part.dtype).at[place].add(part))(total)[:, :width]


class Blocks(NamedTuple):
    """How the arrays of a problem are cut; `order` maps a step of the grid to a block."""

    plan: Plan
    order: Any

    def rows(self, columns: int) -> pl.BlockSpec:
        """Rows of a block, of the program's heads."""
        return pl.BlockSpec((None, self.plan.block, columns), lambda b, k, i: (b, self.order(i), k))

    def previous(self, columns: int) -> pl.BlockSpec:
        """Rows before a block; those of the first block are not read."""
        ratio = self.plan.block // self.plan.before
        return pl.BlockSpec(
            (None, self.plan.before, columns), lambda b, k, i: (b, jnp.maximum(self.order(i) * ratio - 1, 0), k)
        )

    def fixed(self, *shape: int) -> pl.BlockSpec:
        """The program's heads of an array `[B, heads, ...]`."""
        return pl.BlockSpec((None, *shape), lambda b, k, i: (b, k) + (0,) * (len(shape) - 1))


def _flat(rows: Array) -> Array:
    return rows.reshape(*rows.shape[:2], -1)


def _prepare(problem: Problem, plan: Plan, order: Any) -> tuple[Scalars, Inputs, Inputs]:
    """Scalars, arrays and how they are cut."""
    blocks = Blocks(plan, order)
    batch = problem.queries.shape[0]
    query, key, value = (
        plan.kv_heads * size for size in (plan.share * plan.key_size, plan.key_size, plan.value_size)
    )
    start = problem.start
    keys, values = _flat(problem.keys), _flat(problem.values)
    memory = (
        jnp.zeros((batch, problem.keys.shape[2], plan.key_size, plan.value_size), jnp.float32)
        if start is None
        else start.memory
    )
    placed = previous = carried = finished = None
    if problem.placement is not None:
        placed, previous, carried, finished = _placed(problem.placement, start, plan)
    arrays = Inputs(
        queries=_flat(problem.queries),
        keys=keys,
        previous_keys=keys,
        first_keys=None if start is None else _flat(start.keys).astype(keys.dtype),
        values=values,
        previous_values=values,
        first_values=None if start is None else _flat(start.values).astype(values.dtype),
        band=None if problem.taps is None else band_of(problem.taps, plan, values.dtype),
        memory=memory,
        placed=placed,
        previous_placed=previous,
    )

    def when(array: Array | None, spec: pl.BlockSpec) -> pl.BlockSpec | None:
        return None if array is None else spec

    ratio = plan.block // plan.before
    width = plan.before + plan.block
    specs = Inputs(
        queries=blocks.rows(query),
        keys=blocks.rows(key),
        previous_keys=blocks.previous(key),
        first_keys=when(arrays.first_keys, pl.BlockSpec((None, plan.before, key), lambda b, k, i: (b, 0, k))),
        values=blocks.rows(value),
        previous_values=blocks.previous(value),
        first_values=when(arrays.first_values, pl.BlockSpec((None, plan.before, value), lambda b, k, i: (b, 0, k))),
        band=when(
            arrays.band,
            pl.BlockSpec((plan.kv_heads * plan.share, plan.block, width), lambda b, k, i: (k, 0, 0)),
        ),
        memory=blocks.fixed(plan.kv_heads, plan.key_size, plan.value_size),
        placed=when(placed, pl.BlockSpec((None, 8, plan.block), lambda b, k, i: (b, 0, order(i)))),
        previous_placed=when(previous, pl.BlockSpec((None, 8, plan.before), lambda b, k, i: (b, 0, order(i) * ratio))),
    )
    return Scalars(problem.alpha.astype(jnp.float32), carried, finished), arrays, specs


def _placed(placement: Placement, start: Start | None, plan: Plan) -> tuple[Array, Array, Array, Array]:
    """Documents, positions and membership in the memory by token; what the memory speaks of by block; its end."""
    batch, length = placement.documents.shape
    parts = jnp.stack([placement.documents, placement.positions, jnp.zeros_like(placement.documents)], axis=1)
    parts = jnp.pad(parts.astype(jnp.int32), ((0, 0), (0, 5), (0, 0)))
    first = jnp.zeros((batch, 8, plan.before), jnp.int32)
    if start is not None:
        there = start.positions >= 0
        of = jnp.where(there, placement.first[:, None], 0)
        first = jnp.stack([of, jnp.maximum(start.positions, 0), start.known.astype(jnp.int32)], axis=1)
        first = jnp.pad(first.astype(jnp.int32), ((0, 0), (0, 5), (0, 0)))
    previous = jnp.concatenate([first, parts], axis=2)
    documents = jnp.pad(placement.documents, ((0, 0), (0, plan.blocks * plan.block - length)))
    index = jax.lax.cummax(jnp.where(documents > 0, jnp.arange(documents.shape[1]), -1), axis=1)
    ends = jnp.arange(1, plan.blocks) * plan.block - plan.before - 1
    index = index[:, ends]
    found = jnp.take_along_axis(documents, jnp.maximum(index, 0), axis=1)
    middle = jnp.where(index >= 0, found, placement.first[:, None])
    carried = jnp.concatenate([placement.first[:, None], middle, placement.last[:, None]], axis=1).astype(jnp.int32)
    finished = (placement.count // plan.group * plan.group).astype(jnp.int32)
    return parts, previous, carried, finished


def _parameters() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
    )


def _grid(problem: Problem, plan: Plan) -> tuple[int, int, int]:
    return problem.queries.shape[0], problem.keys.shape[2] // plan.kv_heads, plan.blocks


def _with_scalars(
    kernel: Any, scalars: Scalars, plan: Plan
) -> Any:
    """The kernel with the scalars that there are as its first arguments."""
    tree = jax.tree.structure(scalars)
    count = tree.num_leaves

    def body(*refs: Any) -> None:
        kernel(jax.tree.unflatten(tree, refs[:count]), *refs[count:], plan=plan)

    return body


def _call(
    kernel: Any, problem: Problem, plan: Plan, scalars: Scalars, *, in_specs: Any, out_specs: Any, out: Any, scratch: Any, interpret: Any, name: str
) -> Any:
    leaves = jax.tree.leaves(scalars)

    def lifted(spec: pl.BlockSpec) -> pl.BlockSpec:
        index = spec.index_map
        return pl.BlockSpec(spec.block_shape, lambda b, k, i, *_: index(b, k, i))

    is_spec = lambda each: isinstance(each, pl.BlockSpec)  # noqa: E731
    lift = functools.partial(jax.tree.map, lifted, is_leaf=is_spec)
    return functools.partial(
        pl.pallas_call(
            _with_scalars(kernel, scalars, plan),
            out_shape=out,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(leaves),
                grid=_grid(problem, plan),
                in_specs=lift(in_specs),
                out_specs=lift(out_specs),
                scratch_shapes=scratch,
            ),
            compiler_params=_parameters(),
            interpret=interpret,
            name=name,
        ),
        *leaves,
    )


def forward(problem: Problem, plan: Plan, *, interpret: Any = False) -> tuple[Array, Array]:
    """Outputs `[B, T, H, E]` and the memory `[B, K, D, E]` after the rows."""
    scalars, arrays, specs = _prepare(problem, plan, lambda i: i)
    batch, length, heads, _ = problem.queries.shape
    blocks = Blocks(plan, lambda i: i)
    memory = (plan.kv_heads, plan.key_size, plan.value_size)
    outputs, after = _call(
        forward_kernel,
        problem,
        plan,
        scalars,
        in_specs=(specs,),
        out_specs=(blocks.rows(plan.kv_heads * plan.share * plan.value_size), blocks.fixed(*memory)),
        out=(
            jax.ShapeDtypeStruct((batch, length, heads * plan.value_size), problem.values.dtype),
            jax.ShapeDtypeStruct(arrays.memory.shape, jnp.float32),
        ),
        scratch=(pltpu.VMEM(memory, jnp.float32),),
        interpret=interpret,
        name="augmented_attention",
    )(arrays)
    return outputs.reshape(batch, length, heads, plan.value_size), after


class Gradients(NamedTuple):
    """Gradients of a problem's arrays; of the start, those of its memory, keys and values."""

    queries: Array
    keys: Array
    values: Array
    alpha: Array
    taps: Array | None
    memory: Array
    first_keys: Array | None
    first_values: Array | None


def backward(problem: Problem, plan: Plan, outputs: Array, after: Array, *, interpret: Any = False) -> Gradients:
    """Gradients, given those of the outputs `[B, T, H, E]` and of the memory after the rows."""
    cotangents = _flat(outputs)
    queries = _query_gradients(problem, plan, cotangents, interpret)
    keys = _key_gradients(problem, plan, cotangents, after, interpret)
    width = 0 if problem.taps is None else problem.taps.shape[1]

    def shaped(rows: Array | None, like: Array) -> Array | None:
        return None if rows is None else rows.reshape(*rows.shape[:2], *like.shape[2:])

    return Gradients(
        queries=shaped(queries.queries, problem.queries),
        keys=shaped(keys.keys, problem.keys),
        values=shaped(keys.values, problem.values),
        alpha=jnp.sum(queries.alpha[:, :, 0, 0], axis=0),
        taps=None if queries.band is None else taps_of(queries.band, plan, width),
        memory=keys.memory,
        first_keys=shaped(keys.first_keys, problem.keys),
        first_values=shaped(keys.first_values, problem.values),
    )


def _query_gradients(problem: Problem, plan: Plan, cotangents: Array, interpret: Any) -> QueryGradients:
    scalars, arrays, specs = _prepare(problem, plan, lambda i: i)
    blocks = Blocks(plan, lambda i: i)
    batch, length, heads, key_size = problem.queries.shape
    together = plan.kv_heads * plan.share
    band = (together, plan.block, plan.before + plan.block)
    return _call(
        query_gradient_kernel,
        problem,
        plan,
        scalars,
        in_specs=(specs, blocks.rows(together * plan.value_size)),
        out_specs=(
            QueryGradients(
                blocks.rows(together * key_size),
                blocks.fixed(*band) if plan.convolved else None,
                blocks.fixed(together, 8, LANES),
            ),
        ),
        out=(
            QueryGradients(
                jax.ShapeDtypeStruct((batch, length, heads * key_size), problem.queries.dtype),
                jax.ShapeDtypeStruct((batch, heads, *band[1:]), jnp.float32) if plan.convolved else None,
                jax.ShapeDtypeStruct((batch, heads, 8, LANES), jnp.float32),
            ),
        ),
        scratch=(pltpu.VMEM((plan.kv_heads, key_size, plan.value_size), jnp.float32),),
        interpret=interpret,
        name="augmented_attention_query_gradients",
    )(arrays, cotangents)[0]


def _key_gradients(problem: Problem, plan: Plan, cotangents: Array, after: Array, interpret: Any) -> KeyGradients:
    def order(step: Any) -> Any:
        return plan.blocks - 1 - step

    scalars, arrays, specs = _prepare(problem, plan, order)
    blocks = Blocks(plan, order)
    key, value = plan.kv_heads * plan.key_size, plan.kv_heads * plan.value_size
    memory = (plan.kv_heads, plan.key_size, plan.value_size)
    first = None if problem.start is None else (plan.before,)

    def row(columns: int) -> Any:
        return None if first is None else pl.BlockSpec((None, plan.before, columns), lambda b, k, i: (b, 0, k))

    def struct(array: Array | None, dtype: Any = None) -> Any:
        return None if array is None else jax.ShapeDtypeStruct(array.shape, dtype or array.dtype)

    return _call(
        key_gradient_kernel,
        problem,
        plan,
        scalars,
        in_specs=(specs, blocks.rows(plan.share * value), blocks.fixed(*memory)),
        out_specs=(KeyGradients(blocks.rows(key), blocks.rows(value), row(key), row(value), blocks.fixed(*memory)),),
        out=(
            KeyGradients(
                struct(arrays.keys),
                struct(arrays.values),
                struct(arrays.first_keys),
                struct(arrays.first_values),
                struct(arrays.memory),
            ),
        ),
        scratch=(
            Carried(
                pltpu.VMEM(memory, jnp.float32),
                pltpu.VMEM((plan.kv_heads, plan.before, plan.key_size), jnp.float32),
                pltpu.VMEM((plan.kv_heads, plan.before, plan.value_size), jnp.float32),
            ),
        ),
        interpret=interpret,
        name="augmented_attention_key_gradients",
    )(arrays, cotangents, after)[0]
