"""Augmented linear attention on TPU: two Pallas programs, forward, and backward in reverse.

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

from pallas_kernels.augmented_attention.problem import (
    AugmentedGradients,
    AugmentedPlan,
    AugmentedProblem,
    AugmentedResult,
    PackedWindows,
    convolution_matrix,
    taps_gradient,
)
from pallas_kernels.augmented_attention.tpu_kernels import (
    AugmentedGradientOutputs,
    AugmentedInputs,
    AugmentedScalars,
    Carried,
    forward_kernel,
    gradient_kernel,
)
from pallas_kernels.tiles import block_rows
from pallas_kernels.tpu.heads import LANES, SUBLANES, VMEM_BYTES, ProgramHeads, flatten_heads

Order = Callable[[Any], Any]


def plan_for(problem: AugmentedProblem, *, group: int, unit: bool, local: bool) -> AugmentedPlan:
    """Blocks and windows of whole lanes."""
    rows = block_rows("augmented_attention", problem.keys.shape[3], problem.values.shape[3], problem.keys.dtype)
    return AugmentedPlan.of(problem, group=group, unit=unit, local=local, block=rows, multiple=LANES)


def forward(
    problem: AugmentedProblem, plan: AugmentedPlan, *, differentiated: bool = False, interpret: Any = False
) -> AugmentedResult:
    """Outputs, and the memory after the rows; to be differentiated, also what `backward` goes on from."""
    call = _Call.of(problem, plan, lambda step: step)
    batch, length, heads, _ = problem.queries.shape
    size = problem.values.shape[3]
    memory = call.memory_struct.shape
    outputs, before, after = call(
        forward_kernel,
        (),
        out_specs=(call.rows(call.query_heads * size), call.block_memory if differentiated else None, call.memory),
        out=(
            _struct((batch, length, heads * size), problem.values.dtype),
            _struct((batch, plan.blocks, *memory[1:]), jnp.float32) if differentiated else None,
            call.memory_struct,
        ),
        scratch=(pltpu.VMEM(call.memory_shape, jnp.float32),),
        interpret=interpret,
        name="augmented_attention",
    )
    return AugmentedResult(outputs.reshape(batch, length, heads, size), before, after)


def backward(
    problem: AugmentedProblem,
    plan: AugmentedPlan,
    before: Float[Array, "B n K D E"],
    outputs: Float[Array, "B T H E"],
    after: Float[Array, "B K D E"],
    *,
    interpret: Any = False,
) -> AugmentedGradients:
    """Gradients, given the memory before every block, and gradients of the outputs and of the memory after the rows."""
    call = _Call.of(problem, plan, lambda step: plan.blocks - 1 - step)
    heads = call.heads
    found = call(
        gradient_kernel,
        (flatten_heads(outputs), before, after),
        in_specs=(call.rows(call.query_heads * heads.value_size), call.block_memory, call.memory),
        out_specs=(_gradient_specs(problem, plan, call),),
        out=(_gradient_structs(problem, plan, call),),
        scratch=(
            Carried(
                pltpu.VMEM(call.memory_shape, jnp.float32),
                pltpu.VMEM((heads.together, plan.before, heads.key_size), jnp.float32),
                pltpu.VMEM((heads.together, plan.before, heads.value_size), jnp.float32),
            ),
        ),
        interpret=interpret,
        name="augmented_attention_gradients",
    )[0]
    taps, prior = problem.taps, None
    if problem.prior is not None:
        prior = (
            found.memory,
            found.first_keys.reshape(problem.prior.keys.shape),
            found.first_values.reshape(problem.prior.values.shape),
        )
    return AugmentedGradients(
        queries=found.queries.reshape(problem.queries.shape),
        keys=found.keys.reshape(problem.keys.shape),
        values=found.values.reshape(problem.values.shape),
        alpha=None if found.alpha is None else found.alpha[:, 0, 0],
        taps=None if taps is None else taps_gradient(found.matrix, taps.shape[1], plan),
        prior=prior,
    )


def _gradient_specs(problem: AugmentedProblem, plan: AugmentedPlan, call: "_Call") -> AugmentedGradientOutputs:
    """Block specs of the gradients."""
    heads, first = call.heads, problem.prior is not None
    key, value = heads.together * heads.key_size, heads.together * heads.value_size
    return AugmentedGradientOutputs(
        queries=call.rows(heads.share * key),
        keys=call.rows(key),
        values=call.rows(value),
        matrix=None if problem.taps is None else call.of_heads(plan.block, plan.width),
        alpha=None if problem.alpha is None else call.of_heads(SUBLANES, LANES),
        first_keys=call.whole(plan.before, key) if first else None,
        first_values=call.whole(plan.before, value) if first else None,
        memory=call.memory,
    )


def _gradient_structs(problem: AugmentedProblem, plan: AugmentedPlan, call: "_Call") -> AugmentedGradientOutputs:
    """Shapes and types of the gradients."""
    arrays, heads = call.arrays, problem.queries.shape[2]
    return AugmentedGradientOutputs(
        queries=_struct(arrays.queries.shape, arrays.queries.dtype),
        keys=_struct(arrays.keys.shape, arrays.keys.dtype),
        values=_struct(arrays.values.shape, arrays.values.dtype),
        matrix=None if problem.taps is None else _struct((heads, plan.block, plan.width), jnp.float32),
        alpha=None if problem.alpha is None else _struct((heads, SUBLANES, LANES), jnp.float32),
        first_keys=_like(arrays.first_keys),
        first_values=_like(arrays.first_values),
        memory=call.memory_struct,
    )


class _Call(NamedTuple):
    """A problem made ready for a kernel whose steps visit blocks in some order."""

    plan: AugmentedPlan
    order: Order
    grid: tuple[int, int, int]
    heads: ProgramHeads
    scalars: AugmentedScalars
    arrays: AugmentedInputs
    memory_struct: jax.ShapeDtypeStruct

    @classmethod
    def of(cls, problem: AugmentedProblem, plan: AugmentedPlan, order: Order) -> "_Call":
        batch, kv_heads = problem.values.shape[0], problem.values.shape[2]
        heads = ProgramHeads.of(problem.queries, problem.values)
        packed = None if problem.packed is None else PackedWindows.of(problem.packed, problem.prior, plan)
        alpha = None if problem.alpha is None else problem.alpha.astype(jnp.float32)
        return cls(
            plan,
            order,
            (kv_heads // heads.together, batch, plan.blocks),
            heads,
            AugmentedScalars(alpha, None, None)
            if packed is None
            else AugmentedScalars(alpha, packed.carried, packed.finished),
            _arrays(problem, packed, plan),
            _struct((batch, kv_heads, heads.key_size, heads.value_size), jnp.float32),
        )

    @property
    def memory_shape(self) -> tuple[int, int, int]:
        return self.heads.together, self.heads.key_size, self.heads.value_size

    @property
    def query_heads(self) -> int:
        """The program's query heads."""
        return self.heads.together * self.heads.share

    @property
    def memory(self) -> pl.BlockSpec:
        return self.fixed(*self.memory_shape)

    @property
    def block_memory(self) -> pl.BlockSpec:
        """The program's part of the memory before the block."""
        return self._spec((None, None, *self.memory_shape), lambda b, k, i: (b, self.order(i), k, 0, 0))

    def rows(self, columns: int) -> pl.BlockSpec:
        """A block's rows, of the program's heads."""
        return self._spec((None, self.plan.block, columns), lambda b, k, i: (b, self.order(i), k))

    def previous(self, columns: int) -> pl.BlockSpec:
        """The rows before a block; for the first block any, as they are masked."""
        ratio = self.plan.block // self.plan.before

        def index(b: Any, k: Any, i: Any) -> tuple[Any, Any, Any]:
            return b, jnp.maximum(self.order(i) * ratio - 1, 0), k

        return self._spec((None, self.plan.before, columns), index)

    def whole(self, rows: int, columns: int) -> pl.BlockSpec:
        """All rows, of the program's heads."""
        return self._spec((None, rows, columns), lambda b, k, i: (b, 0, k))

    def fixed(self, *shape: int) -> pl.BlockSpec:
        """The program's heads of an array `[B, heads, ...]`."""
        return self._spec((None, *shape), lambda b, k, i: (b, k) + (0,) * (len(shape) - 1))

    def of_heads(self, *shape: int) -> pl.BlockSpec:
        """The program's query heads of an array `[H, ...]`."""
        return self._spec((self.query_heads, *shape), lambda b, k, i: (k,) + (0,) * len(shape))

    @staticmethod
    def _spec(shape: tuple[int | None, ...], index: Callable[[Any, Any, Any], tuple[Any, ...]]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda k, b, i, *scalars: index(b, k, i))

    def specs(self) -> AugmentedInputs:
        """Block specs of the arrays."""
        plan, heads, arrays = self.plan, self.heads, self.arrays
        key, value = heads.together * heads.key_size, heads.together * heads.value_size
        ratio = plan.block // plan.before
        specs = AugmentedInputs(
            queries=self.rows(heads.share * key),
            keys=self.rows(key),
            previous_keys=self.previous(key),
            first_keys=self.whole(plan.before, key),
            values=self.rows(value),
            previous_values=self.previous(value),
            first_values=self.whole(plan.before, value),
            matrix=self.of_heads(plan.block, plan.width),
            memory=self.memory,
            segments=self._spec((None, SUBLANES, plan.block), lambda b, k, i: (b, 0, self.order(i))),
            previous_segments=self._spec((None, SUBLANES, plan.before), lambda b, k, i: (b, 0, self.order(i) * ratio)),
        )
        return AugmentedInputs(*(None if array is None else spec for array, spec in zip(arrays, specs, strict=True)))

    def __call__(
        self,
        kernel: Callable[..., None],
        more: tuple[Array, ...],
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
                grid=self.grid,
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


def _arrays(problem: AugmentedProblem, packed: PackedWindows | None, plan: AugmentedPlan) -> AugmentedInputs:
    prior = problem.prior
    keys, values = flatten_heads(problem.keys), flatten_heads(problem.values)
    matrix = None if problem.taps is None else convolution_matrix(problem.taps.astype(values.dtype), plan)
    rows = previous = None
    if packed is not None:
        rows = _sublanes(packed.rows)
        previous = _sublanes(jnp.concatenate([packed.first, packed.rows], axis=2))
    return AugmentedInputs(
        queries=flatten_heads(problem.queries),
        keys=keys,
        previous_keys=keys,
        first_keys=None if prior is None else flatten_heads(prior.keys).astype(keys.dtype),
        values=values,
        previous_values=values,
        first_values=None if prior is None else flatten_heads(prior.values).astype(values.dtype),
        matrix=matrix,
        memory=None if prior is None else prior.memory.astype(jnp.float32),
        segments=rows,
        previous_segments=previous,
    )


def _sublanes(rows: Array) -> Array:
    return jnp.pad(rows, ((0, 0), (0, SUBLANES - rows.shape[1]), (0, 0)))


def _struct(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _like(array: Array | None) -> jax.ShapeDtypeStruct | None:
    return None if array is None else _struct(array.shape, array.dtype)
