"""Linear attention on TPU: two Pallas programs, forward, and backward in reverse.

Heads stay where projections leave them, side by side in the last axis. Rows are not padded: the last block of a row
reads beyond its end and masks what it finds there.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.linear_attention.blocks import divisor
from pallas_kernels.linear_attention.problem import LinearGradients, LinearPlan, LinearProblem, Memory, PackedBlocks
from pallas_kernels.linear_attention.tpu_kernels import (
    Cotangents,
    LinearGradientOutputs,
    LinearInputs,
    LinearScalars,
    MemoryPair,
    forward_kernel,
    gradient_kernel,
)
from pallas_kernels.tiles import block_rows
from pallas_kernels.tpu.heads import LANES, SUBLANES, VMEM_BYTES, ProgramHeads, flatten_heads

Outputs = Float[Array, "B T H E"]
Totals = Float[Array, "B H 1 T"]


class LinearTpuResult(NamedTuple):
    """Results of the forward program.

    Attributes:
        outputs: `[B, T, H, E]`.
        totals: `[B, H, 1, T]` float32, the sums of weights; None if nothing is divided by them.
        before: the memory before every block, `[B, n, K, D, E]` and `[B, n, K, 1, D]`; None if nobody asks.
        after: the memory after the rows.
    """

    outputs: Outputs
    totals: Totals | None
    before: MemoryPair | None
    after: Memory


def plan_for(problem: LinearProblem, floor: float | None) -> LinearPlan:
    """Blocks of whole lanes."""
    length = problem.queries.shape[1]
    rows = block_rows("linear_attention", problem.keys.shape[3], problem.values.shape[3], problem.keys.dtype)
    block = min(rows, -(-length // LANES) * LANES)
    return LinearPlan(block, length, floor)


def forward(
    problem: LinearProblem, plan: LinearPlan, *, differentiated: bool = False, interpret: Any = False
) -> LinearTpuResult:
    """Outputs, and the memory after the rows in float32; to be differentiated, also what `backward` goes on from."""
    call = _Call.of(problem, plan, lambda step: step)
    batch, length, heads, _ = problem.queries.shape
    size = problem.values.shape[3]
    divided = plan.floor is not None
    outputs, totals, before, after = call(
        forward_kernel,
        (),
        out_specs=(
            call.rows(call.query_heads * size),
            call.totals if divided else None,
            call.block_memories if differentiated else None,
            call.memories,
        ),
        out=(
            _struct((batch, length, heads * size), problem.values.dtype),
            _struct((batch, heads, 1, length)) if divided else None,
            call.block_memory_structs if differentiated else None,
            call.memory_structs,
        ),
        interpret=interpret,
        name="linear_attention",
    )
    outputs = outputs.reshape(batch, length, heads, size)
    return LinearTpuResult(outputs, totals, before, Memory(after.values, after.keys[:, :, 0]))


def backward(
    problem: LinearProblem,
    plan: LinearPlan,
    result: LinearTpuResult,
    cotangents: Outputs,
    after: Memory,
    *,
    interpret: Any = False,
) -> LinearGradients:
    """Gradients of the problem's arrays, given those of the outputs and of the memory after the rows."""
    slopes = _cotangents(plan, result, cotangents)
    call = _Call.of(problem, plan, lambda step: plan.blocks - 1 - step)
    arrays = call.arrays
    (found,) = call(
        gradient_kernel,
        (slopes, result.before, _memories(after)),
        in_specs=(call.slopes(slopes), call.block_memories, call.memories),
        out_specs=(
            LinearGradientOutputs(
                call.rows(call.heads.share * call.keys), call.rows(call.keys), call.rows(call.values), call.memories
            ),
        ),
        out=(
            LinearGradientOutputs(_like(arrays.queries), _like(arrays.keys), _like(arrays.values), call.memory_structs),
        ),
        interpret=interpret,
        name="linear_attention_gradients",
    )
    return LinearGradients(
        found.queries.reshape(problem.queries.shape),
        found.keys.reshape(problem.keys.shape),
        found.values.reshape(problem.values.shape),
        Memory(found.start.values, found.start.keys[:, :, 0]),
    )


def _cotangents(plan: LinearPlan, result: LinearTpuResult, cotangents: Outputs) -> Cotangents:
    """Gradients of the sums and of their divisors, given those of the outputs."""
    totals = result.totals
    if totals is None or plan.floor is None:
        return Cotangents(flatten_heads(cotangents), None)
    divided = jnp.moveaxis(divisor(totals, plan.floor)[:, :, 0], 1, 2)
    wide = cotangents.astype(jnp.float32) / divided[..., None]
    slope = -jnp.sum(wide * result.outputs.astype(jnp.float32), axis=3)
    slope = jnp.moveaxis(slope, 2, 1)[:, :, None]
    moves = totals > plan.floor if plan.floor else totals != 0
    return Cotangents(flatten_heads(wide.astype(cotangents.dtype)), jnp.where(moves, slope, 0))


class _Call(NamedTuple):
    """A problem made ready for a kernel whose steps visit blocks in some order."""

    plan: LinearPlan
    order: Callable[[Any], Any]
    grid: tuple[int, int, int]
    heads: ProgramHeads
    scalars: LinearScalars
    arrays: LinearInputs

    @classmethod
    def of(cls, problem: LinearProblem, plan: LinearPlan, order: Callable[[Any], Any]) -> "_Call":
        heads = ProgramHeads.of(problem.queries, problem.values)
        batch, kv_heads = problem.values.shape[0], problem.values.shape[2]
        packed = None if problem.segment_ids is None else PackedBlocks.of(problem.segment_ids, plan)
        rows = None if packed is None else jnp.pad(packed.rows, ((0, 0), (0, SUBLANES - 2), (0, 0)))
        decay = None if problem.log_decay is None else problem.log_decay.astype(jnp.float32)
        queries, keys, values = (flatten_heads(each) for each in (problem.queries, problem.keys, problem.values))
        arrays = LinearInputs(queries, keys, values, _memories(problem.start), rows)
        scalars = (
            LinearScalars(decay, None, None) if packed is None else LinearScalars(decay, packed.carried, packed.clock)
        )
        return cls(plan, order, (batch, kv_heads // heads.together, plan.blocks), heads, scalars, arrays)

    @property
    def keys(self) -> int:
        """Columns of the program's keys."""
        return self.heads.together * self.heads.key_size

    @property
    def values(self) -> int:
        """Columns of the program's values."""
        return self.heads.together * self.heads.value_size

    @property
    def query_heads(self) -> int:
        """The program's query heads."""
        return self.heads.together * self.heads.share

    @property
    def memory_structs(self) -> MemoryPair:
        return MemoryPair(*(_struct(each.shape) for each in self.arrays.start))

    @property
    def memories(self) -> MemoryPair:
        return MemoryPair(*(self._fixed(*each.shape[2:]) for each in self.arrays.start))

    @property
    def block_memory_structs(self) -> MemoryPair:
        """Memories before every block."""
        batch, *shapes = (self.grid[0], *(each.shape[1:] for each in self.arrays.start))
        return MemoryPair(*(_struct((batch, self.plan.blocks, *shape)) for shape in shapes))

    @property
    def block_memories(self) -> MemoryPair:
        """The program's part of the memory before the block."""

        def spec(shape: tuple[int, ...]) -> pl.BlockSpec:
            size = (None, None, self.heads.together, *shape)
            return _spec(size, lambda b, k, i: (b, self.order(i), k) + (0,) * len(shape))

        return MemoryPair(*(spec(each.shape[2:]) for each in self.arrays.start))

    @property
    def totals(self) -> pl.BlockSpec:
        """Numbers of the program's query heads, for a block's rows."""
        return _spec((None, self.query_heads, 1, self.plan.block), lambda b, k, i: (b, k, 0, self.order(i)))

    def slopes(self, slopes: Cotangents) -> Cotangents:
        return Cotangents(self.rows(self.heads.share * self.values), None if slopes.totals is None else self.totals)

    def rows(self, columns: int) -> pl.BlockSpec:
        """A block's rows, of the program's heads."""
        return _spec((None, self.plan.block, columns), lambda b, k, i: (b, self.order(i), k))

    def _fixed(self, *shape: int) -> pl.BlockSpec:
        """The program's key/value heads of an array `[B, K, ...]`."""
        return _spec((None, self.heads.together, *shape), lambda b, k, i: (b, k) + (0,) * len(shape))

    def _specs(self) -> LinearInputs:
        segments = None
        if self.arrays.segments is not None:
            segments = _spec((None, SUBLANES, self.plan.block), lambda b, k, i: (b, 0, self.order(i)))
        return LinearInputs(
            self.rows(self.heads.share * self.keys),
            self.rows(self.keys),
            self.rows(self.values),
            self.memories,
            segments,
        )

    def __call__(
        self,
        kernel: Callable[..., None],
        more: tuple[Any, ...],
        *,
        in_specs: tuple[Any, ...] = (),
        out_specs: tuple[Any, ...],
        out: tuple[Any, ...],
        interpret: Any,
        name: str,
    ) -> Any:
        """Runs a kernel over the problem's arrays and some more."""
        leaves, tree = jax.tree.flatten(self.scalars)

        def body(*refs: Any) -> None:
            scalars = jax.tree.unflatten(tree, refs[: len(leaves)])
            kernel(scalars, *refs[len(leaves) :], plan=self.plan, heads=self.heads)

        scratch = MemoryPair(
            *(pltpu.VMEM((self.heads.together, *each.shape[2:]), jnp.float32) for each in self.arrays.start)
        )
        return pl.pallas_call(
            body,
            out_shape=out,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(leaves),
                grid=self.grid,
                in_specs=(self._specs(), *in_specs),
                out_specs=out_specs,
                scratch_shapes=(scratch,),
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
            ),
            interpret=interpret,
            name=name,
        )(*leaves, self.arrays, *more)


def _memories(memory: Memory) -> MemoryPair:
    return MemoryPair(memory.values.astype(jnp.float32), memory.keys.astype(jnp.float32)[:, :, None])


def _spec(shape: tuple[int | None, ...], index: Callable[[Any, Any, Any], tuple[Any, ...]]) -> pl.BlockSpec:
    return pl.BlockSpec(shape, lambda b, k, i, *scalars: index(b, k, i))


def _struct(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _like(array: Array) -> jax.ShapeDtypeStruct:
    return _struct(array.shape, array.dtype)
