"""Attention over a window and a memory on TPU: two Pallas programs, forward, and backward in reverse.

Heads stay where projections leave them, side by side in the last axis: a program takes as many of them as fill 128
lanes. Rows are not padded: the last block of a row reads beyond its end and masks what it finds there.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.linear_attention.problem import Memory
from pallas_kernels.tiles import block_rows
from pallas_kernels.tpu.heads import LANES, SUBLANES, VMEM_BYTES, ProgramHeads, flatten_heads
from pallas_kernels.windowed_attention.problem import (
    AttentionWindowPlan,
    FeatureWeights,
    WindowedGradients,
    WindowedPlan,
    WindowedProblem,
    WindowedResult,
    packed_windows,
)
from pallas_kernels.windowed_attention.tpu_kernels import (
    CarriedGradients,
    FeatureMemory,
    MapRefs,
    TokenRows,
    WindowedGradientOutputs,
    WindowedInputs,
    WindowedScalars,
    forward_kernel,
    gradient_kernel,
)

Order = Callable[[Any], Any]


def plan_for(problem: WindowedProblem, window: AttentionWindowPlan) -> WindowedPlan:
    """Blocks and windows of whole lanes."""
    rows = block_rows("windowed_attention", problem.features, problem.values.shape[3], problem.keys.dtype)
    return WindowedPlan.of(problem, window, block=rows, multiple=LANES)


def forward(
    problem: WindowedProblem, plan: WindowedPlan, *, differentiated: bool = False, interpret: Any = False
) -> WindowedResult:
    """Outputs, and the memory after the rows; to be differentiated, also what `backward` goes on from."""
    call = _Call.of(problem, plan, lambda step: step)
    batch, length, heads, _ = problem.queries.shape
    size = problem.values.shape[3]
    outputs, before, after, totals = call(
        forward_kernel,
        (),
        out_specs=(
            call.rows(call.query_heads * size),
            call.block_memory if differentiated else None,
            call.memory if call.placed else None,
            call.totals if plan.window.sinks else None,
        ),
        out=(
            _struct((batch, length, heads * size), problem.values.dtype),
            call.block_memory_structs if differentiated else None,
            call.memory_structs if call.placed else None,
            _struct((batch, heads, 1, length)) if plan.window.sinks else None,
        ),
        scratch=(call.memory_scratch,),
        interpret=interpret,
        name="windowed_attention",
    )
    if after is None:
        after = jax.tree.map(lambda each: jnp.zeros(each.shape), call.memory_structs)
    totals = None if totals is None else totals[:, :, 0]
    return WindowedResult(outputs.reshape(batch, length, heads, size), before, _memory(after), totals)


def backward(
    problem: WindowedProblem,
    plan: WindowedPlan,
    before: FeatureMemory,
    outputs: Float[Array, "B T H E"],
    after: Memory,
    totals: Float[Array, "B H T"] | None = None,
    *,
    interpret: Any = False,
) -> WindowedGradients:
    """Gradients, given the memory before every block, and gradients of what `forward` returned."""
    call = _Call.of(problem, plan, lambda step: plan.blocks - 1 - step)
    heads, decayed = call.heads, problem.log_decays is not None
    scratch = CarriedGradients(
        call.memory_scratch,
        pltpu.VMEM((heads.together, plan.before, heads.key_size), jnp.float32),
        pltpu.VMEM((heads.together, plan.before, heads.value_size), jnp.float32),
        pltpu.VMEM((heads.together, 1, plan.before), jnp.float32) if decayed else None,
    )
    (found,) = call(
        gradient_kernel,
        (
            flatten_heads(outputs),
            before,
            _feature_memory(after) if call.placed else None,
            None if totals is None else totals[:, :, None],
        ),
        in_specs=(
            call.rows(call.query_heads * heads.value_size),
            call.block_memory,
            call.memory if call.placed else None,
            None if totals is None else call.totals,
        ),
        out_specs=(_gradient_specs(call),),
        out=(_gradient_structs(problem, call),),
        scratch=(scratch,),
        interpret=interpret,
        name="windowed_attention_gradients",
    )
    prior = None
    if problem.prior is not None and found.first is not None:
        first = found.first
        prior = (
            _memory(found.memory),
            first.keys.reshape(problem.prior.keys.shape),
            first.values.reshape(problem.prior.values.shape),
            _decays_of(first.decays),
        )
    return WindowedGradients(
        queries=found.queries.reshape(problem.queries.shape),
        keys=found.own.keys.reshape(problem.keys.shape),
        values=found.own.values.reshape(problem.values.shape),
        weights=FeatureWeights(
            jnp.swapaxes(found.maps.queries, 1, 2),
            jnp.swapaxes(found.maps.keys, 1, 2),
            *(None if each is None else each[:, 0] for each in found.maps[2:]),
        ),
        balance=found.balance[:, 0, 0],
        log_decays=_decays_of(found.own.decays),
        prior=prior,
    )


def _gradient_specs(call: "_Call") -> WindowedGradientOutputs:
    """Block specs of the gradients."""
    specs = call.specs()
    return WindowedGradientOutputs(
        queries=specs.queries,
        own=specs.own,
        first=specs.first,
        maps=specs.maps,
        balance=call.of_heads(call.query_heads, SUBLANES, LANES),
        memory=specs.memory,
    )


def _gradient_structs(problem: WindowedProblem, call: "_Call") -> WindowedGradientOutputs:
    """Shapes and types of the gradients."""
    arrays = call.arrays
    queries, own, first, maps = jax.tree.map(_like, (arrays.queries, arrays.own, arrays.first, arrays.maps))
    balance = _struct((problem.queries.shape[2], SUBLANES, LANES))
    return WindowedGradientOutputs(
        queries, own, first, maps, balance, None if arrays.memory is None else call.memory_structs
    )


class _Call(NamedTuple):
    """A problem made ready for a kernel whose steps visit blocks in some order."""

    plan: WindowedPlan
    order: Order
    batch: int
    kv_heads: int
    features: int
    heads: ProgramHeads
    scalars: WindowedScalars
    arrays: WindowedInputs

    @classmethod
    def of(cls, problem: WindowedProblem, plan: WindowedPlan, order: Order) -> "_Call":
        packed = packed_windows(problem, plan)
        carried, finished = (None, None) if packed is None else (packed.carried, packed.finished)
        segments: tuple[Array | None, Array | None] = (None, None)
        if packed is not None:
            segments = _sublanes(packed.rows), _sublanes(jnp.concatenate([packed.first, packed.rows], axis=2))
        prior, first = problem.prior, None
        if prior is not None:
            first = _tokens(prior.keys, prior.values, prior.log_decays, problem)
        own = _tokens(problem.keys, problem.values, problem.log_decays, problem)
        arrays = WindowedInputs(
            queries=flatten_heads(problem.queries),
            own=own,
            previous=own,
            first=first,
            maps=_maps(problem.weights),
            memory=None if prior is None else _feature_memory(prior.memory),
            segments=segments[0],
            previous_segments=segments[1],
        )
        return cls(
            plan,
            order,
            problem.keys.shape[0],
            problem.keys.shape[2],
            problem.features,
            ProgramHeads.of(problem.queries, problem.values),
            WindowedScalars(problem.balance.astype(jnp.float32), carried, finished),
            arrays,
        )

    @property
    def placed(self) -> bool:
        """True where rows have segment ids; otherwise the memory after them has no meaning."""
        return self.arrays.segments is not None

    @property
    def query_heads(self) -> int:
        """The program's query heads."""
        return self.heads.together * self.heads.share

    @property
    def memory_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of a head's memory and of its normaliser."""
        return (self.heads.value_size, self.features), (1, self.features)

    @property
    def memory_scratch(self) -> FeatureMemory:
        return FeatureMemory(*(pltpu.VMEM((self.heads.together, *each), jnp.float32) for each in self.memory_shapes))

    @property
    def memory_structs(self) -> FeatureMemory:
        return FeatureMemory(*(_struct((self.batch, self.kv_heads, *each)) for each in self.memory_shapes))

    @property
    def block_memory_structs(self) -> FeatureMemory:
        lead = self.batch, self.plan.blocks, self.kv_heads
        return FeatureMemory(*(_struct((*lead, *each)) for each in self.memory_shapes))

    @property
    def memory(self) -> FeatureMemory:
        return FeatureMemory(*(self.fixed(*each) for each in self.memory_shapes))

    @property
    def block_memory(self) -> FeatureMemory:
        """The program's part of the memory before the block."""

        def index(b: Any, k: Any, i: Any) -> tuple[Any, ...]:
            return b, self.order(i), k, 0, 0

        return FeatureMemory(*(_spec((None, None, self.heads.together, *each), index) for each in self.memory_shapes))

    @property
    def totals(self) -> pl.BlockSpec:
        """A number for each of a block's rows, of the program's query heads."""
        return _spec((None, self.query_heads, 1, self.plan.block), lambda b, k, i: (b, k, 0, self.order(i)))

    def rows(self, columns: int) -> pl.BlockSpec:
        """A block's rows, of the program's heads."""
        return _spec((None, self.plan.block, columns), lambda b, k, i: (b, self.order(i), k))

    def fixed(self, *shape: int) -> pl.BlockSpec:
        """The program's heads of an array `[B, heads, ...]`."""
        return _spec((None, self.heads.together, *shape), lambda b, k, i: (b, k) + (0,) * len(shape))

    def of_heads(self, count: int, *shape: int) -> pl.BlockSpec:
        """The program's heads of an array `[heads, ...]`."""
        return _spec((count, *shape), lambda b, k, i: (k,) + (0,) * len(shape))

    def tokens(self, rows: int, place: Order) -> TokenRows:
        """So many rows of tokens, at a place that depends on the step."""
        heads = self.heads
        key, value = heads.together * heads.key_size, heads.together * heads.value_size
        return TokenRows(
            _spec((None, rows, key), lambda b, k, i: (b, place(i), k)),
            _spec((None, rows, value), lambda b, k, i: (b, place(i), k)),
            None
            if self.arrays.own.decays is None
            else _spec((None, heads.together, 1, rows), lambda b, k, i: (b, k, 0, place(i))),
        )

    def specs(self) -> WindowedInputs:
        """Block specs of the arrays."""
        plan, arrays, heads = self.plan, self.arrays, self.heads
        ratio = plan.block // plan.before
        sizes = heads.key_size, self.features
        return WindowedInputs(
            queries=self.rows(self.query_heads * heads.key_size),
            own=self.tokens(plan.block, self.order),
            # The rows before a block; for the first block any, as they are masked.
            previous=self.tokens(plan.before, lambda i: jnp.maximum(self.order(i) * ratio - 1, 0)),
            first=None if arrays.first is None else self.tokens(plan.before, lambda i: 0),
            maps=MapRefs(
                self.of_heads(self.query_heads, *sizes),
                self.of_heads(heads.together, *sizes),
                None if arrays.maps.query_bias is None else self.of_heads(self.query_heads, 1, self.features),
                None if arrays.maps.key_bias is None else self.of_heads(heads.together, 1, self.features),
            ),
            memory=None if arrays.memory is None else self.memory,
            segments=_spec((None, SUBLANES, plan.block), lambda b, k, i: (b, 0, self.order(i)))
            if self.placed
            else None,
            previous_segments=_spec((None, SUBLANES, plan.before), lambda b, k, i: (b, 0, self.order(i) * ratio))
            if self.placed
            else None,
        )

    def __call__(
        self,
        kernel: Callable[..., None],
        more: tuple[Any, ...],
        *,
        in_specs: tuple[Any, ...] = (),
        out_specs: tuple[Any, ...],
        out: tuple[Any, ...],
        scratch: tuple[Any, ...],
        interpret: Any,
        name: str,
    ) -> Any:
        """Runs a kernel over the problem's arrays and some more."""
        leaves, tree = jax.tree.flatten(self.scalars)

        def body(*refs: Any) -> None:
            scalars = jax.tree.unflatten(tree, refs[: len(leaves)])
            kernel(scalars, *refs[len(leaves) :], plan=self.plan, heads=self.heads)

        return pl.pallas_call(
            body,
            out_shape=out,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(leaves),
                grid=(self.kv_heads // self.heads.together, self.batch, self.plan.blocks),
                in_specs=(self.specs(), *in_specs),
                out_specs=out_specs,
                scratch_shapes=scratch,
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
            ),
            interpret=interpret,
            name=name,
        )(*leaves, self.arrays, *more)


def _tokens(keys: Array, values: Array, log_decays: Array | None, like: WindowedProblem) -> TokenRows:
    return TokenRows(
        flatten_heads(keys).astype(like.keys.dtype),
        flatten_heads(values).astype(like.values.dtype),
        None if log_decays is None else jnp.swapaxes(log_decays.astype(jnp.float32), 1, 2)[:, :, None],
    )


def _decays_of(rows: Array | None) -> Array | None:
    return None if rows is None else jnp.swapaxes(rows[:, :, 0], 1, 2)


def _maps(weights: FeatureWeights) -> MapRefs:
    wide = jax.tree.map(lambda each: each.astype(jnp.float32), weights)
    return MapRefs(
        jnp.swapaxes(wide.queries, 1, 2),
        jnp.swapaxes(wide.keys, 1, 2),
        *(None if each is None else each[:, None] for each in wide[2:]),
    )


def _feature_memory(memory: Memory) -> FeatureMemory:
    values, keys = (each.astype(jnp.float32) for each in memory)
    return FeatureMemory(jnp.swapaxes(values, 2, 3), keys[:, :, None])


def _memory(memory: FeatureMemory) -> Memory:
    return Memory(jnp.swapaxes(memory.values, 2, 3), memory.keys[:, :, 0])


def _sublanes(rows: Array) -> Array:
    return jnp.pad(rows, ((0, 0), (0, SUBLANES - rows.shape[1]), (0, 0)))


def _spec(shape: tuple[int | None, ...], index: Callable[[Any, Any, Any], tuple[Any, ...]]) -> pl.BlockSpec:
    return pl.BlockSpec(shape, lambda k, b, i, *scalars: index(b, k, i))


def _struct(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _like(array: Array) -> jax.ShapeDtypeStruct:
    return _struct(array.shape, array.dtype)
