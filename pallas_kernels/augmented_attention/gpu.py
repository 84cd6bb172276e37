"""Augmented linear attention on GPU: Triton programs that run side by side, but for the memories before blocks.

Forward, two kernels leave the memory before every block; another one, for all tiles of all blocks at once, the outputs.
Backward, the first two go in reverse and leave gradients of the memories, and two more those of queries and of keys and
values.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.augmented_attention.problem import (
    AugmentedGradients,
    AugmentedPlan,
    AugmentedProblem,
    AugmentedResult,
    PackedWindows,
)
from pallas_kernels.gpu.launch import kernels_of, launch
from pallas_kernels.gpu.memories import Memories, Scan, SummedRows, scan_memories
from pallas_kernels.tiles import Tiles, block_rows, next_power, tiles_for

KERNELS = "pallas_kernels.augmented_attention.gpu_kernels"
# Kernels with tiles of their own; all of them divide blocks.
TILED = ("memories", "outputs", "query_gradients", "key_gradients")


def plan_for(problem: AugmentedProblem, *, group: int, unit: bool, local: bool) -> AugmentedPlan:
    """Blocks of whole tiles."""
    multiple = max(_tiles(problem, kernel).rows for kernel in TILED)
    rows = block_rows("augmented_attention", problem.keys.shape[3], problem.values.shape[3], problem.keys.dtype)
    return AugmentedPlan.of(problem, group=group, unit=unit, local=local, block=rows, multiple=multiple)


def forward(
    problem: AugmentedProblem, plan: AugmentedPlan, *, differentiated: bool = False, interpret: bool = False
) -> AugmentedResult:
    """Outputs, and the memory after the rows; to be differentiated, also what `backward` goes on from."""
    call = _Call.of(problem, plan, interpret)
    before, after = call.memories()
    batch, length, heads, _ = problem.queries.shape
    size = problem.values.shape[3]
    tiles = _tiles(problem, "outputs")
    parts = -(-size // tiles.part)
    outputs = call.launch(
        "outputs_kernel",
        (before, *call.factors, call.places, call.carried, length, plan.blocks),
        (_struct((batch, length, heads, size), problem.values.dtype),),
        tiles,
        grid=(-(-length // tiles.rows) * parts, heads, batch),
        PART_D=tiles.piece,
        PART_E=tiles.part,
        PARTS=parts,
    )[0]
    return AugmentedResult(outputs, before if differentiated else None, after)


def backward(
    problem: AugmentedProblem,
    plan: AugmentedPlan,
    before: Float[Array, "B n K D E"],
    outputs: Float[Array, "B T H E"],
    after: Float[Array, "B K D E"],
    *,
    interpret: bool = False,
) -> AugmentedGradients:
    """Gradients, given the memory before every block, and gradients of the outputs and of the memory after the rows."""
    call = _Call.of(problem, plan, interpret)
    memory_gradients, memory = call.memory_gradients(outputs, after)
    queries, alpha, taps = _query_gradients(call, before, outputs)
    keys, values, *first = _key_gradients(call, memory_gradients, outputs)
    return AugmentedGradients(
        queries=queries,
        keys=keys,
        values=values,
        alpha=None if problem.alpha is None else alpha,
        taps=taps,
        prior=(memory, first[0], first[1]) if problem.prior is not None else None,
    )


def _query_gradients(call: "_Call", before: Array, cotangents: Array) -> tuple[Array, Array, Array | None]:
    """Gradients of queries, alpha and taps."""
    problem, plan = call.problem, call.plan
    batch, length, heads, _ = problem.queries.shape
    tiles = _tiles(problem, "query_gradients")
    count, parts = -(-length // tiles.rows), -(-problem.values.shape[3] // tiles.part)
    width = call.width
    queries, alpha, taps = call.launch(
        "query_gradients_kernel",
        (before, cotangents, *call.factors, call.places, call.carried, length, plan.blocks),
        (
            _struct((parts, *problem.queries.shape), problem.queries.dtype if parts == 1 else jnp.float32),
            _struct((parts, batch, count, heads), jnp.float32),
            _struct((parts, batch, count, heads, max(width, 1)), jnp.float32),
        ),
        tiles,
        grid=(count * parts, heads, batch),
        PART_E=tiles.part,
        PIECE_E=tiles.piece,
        PARTS=parts,
        WIDE_WIDTH=next_power(width),
    )
    return (
        _summed(queries, problem.queries.dtype),
        jnp.sum(alpha, axis=(0, 1, 2)),
        jnp.sum(taps, axis=(0, 1, 2)) if width else None,
    )


def _key_gradients(call: "_Call", memory_gradients: Array, cotangents: Array) -> tuple[Array, Array, Array, Array]:
    """Gradients of keys and values, and of those before the row."""
    problem, plan = call.problem, call.plan
    batch, length, kv_heads, _ = problem.keys.shape
    tiles = _tiles(problem, "key_gradients")
    early = plan.before if problem.prior is not None else 0
    parts = -(-problem.values.shape[3] // tiles.part)
    key_dtype = problem.keys.dtype if parts == 1 else jnp.float32
    first = (batch, max(early, 1), kv_heads)
    keys, values, first_keys, first_values = call.launch(
        "key_gradients_kernel",
        (memory_gradients, cotangents, *call.factors, call.places, call.folded, length, plan.blocks),
        (
            _struct((parts, *problem.keys.shape), key_dtype),
            _struct(problem.values.shape, problem.values.dtype),
            _struct((parts, *first, problem.keys.shape[3]), key_dtype),
            _struct((*first, problem.values.shape[3]), problem.values.dtype),
        ),
        tiles,
        grid=((-(-length // tiles.rows) + early // tiles.rows) * parts, kv_heads, batch),
        PART_D=tiles.piece,
        PART_E=tiles.part,
        PIECE_E=tiles.piece,
        PARTS=parts,
    )
    return _summed(keys, problem.keys.dtype), values, _summed(first_keys, problem.keys.dtype), first_values


class _Call(NamedTuple):
    """A problem made ready for kernels; absent arrays are single numbers that no kernel reads."""

    problem: AugmentedProblem
    plan: AugmentedPlan
    interpret: bool
    places: Array  # [B, 3, P + T]
    carried: Array  # [B, n + 1]
    folded: Array  # [B, P + T] float32, rows that join the memory
    reads: Array  # [B, T] float32, queries of the memory's document
    keep: Array  # [B, n] float32, whether the memory survives a block
    scales: tuple[Array, Array]  # [B, H, T] and [B, K, T] float32, what queries and keys are multiplied by

    @classmethod
    def of(cls, problem: AugmentedProblem, plan: AugmentedPlan, interpret: bool) -> "_Call":
        scales = _unit_scales(problem.queries, plan), _unit_scales(problem.keys, plan)
        if problem.packed is None:
            whole, number = jnp.zeros((1,), jnp.int32), jnp.zeros((1,))
            return cls(problem, plan, interpret, whole, whole, number, number, number, scales)
        packed = PackedWindows.of(problem.packed, problem.prior, plan)
        places = jnp.concatenate([packed.first, packed.rows], axis=2)
        segment, position, known = places[:, 0], places[:, 1], places[:, 2]
        carried = packed.carried
        joins = jnp.minimum(jnp.arange(places.shape[2]) // plan.block, plan.blocks - 1)
        complete = (segment != carried[:, -1:]) | (position < packed.finished[:, None])
        folded = (segment > 0) & (segment == carried[:, joins + 1]) & (known == 0) & complete
        own = segment[:, plan.before :]
        reads = (own > 0) & (own == carried[:, jnp.arange(plan.length) // plan.block])
        folded, reads, keep = (each.astype(jnp.float32) for each in (folded, reads, carried[:, :-1] == carried[:, 1:]))
        return cls(problem, plan, interpret, places, carried, folded, reads, keep, scales)

    @property
    def width(self) -> int:
        """Taps of the convolution."""
        return 0 if self.problem.taps is None else self.problem.taps.shape[1]

    @property
    def factors(self) -> tuple[Array, Array]:
        """Alpha and taps."""
        alpha, taps = (
            jnp.zeros((1,)) if each is None else each.astype(jnp.float32)
            for each in (self.problem.alpha, self.problem.taps)
        )
        return alpha, taps

    @property
    def first(self) -> tuple[Array, Array]:
        """Keys and values before the row."""
        problem = self.problem
        if problem.prior is None:
            return problem.keys, problem.values
        return problem.prior.keys.astype(problem.keys.dtype), problem.prior.values.astype(problem.values.dtype)

    def launch(
        self, name: str, more: tuple[Any, ...], outputs: Any, tiles: Tiles, *, grid: Any, **more_constants: Any
    ) -> list[Array]:
        """Runs a kernel that reads queries, keys and values."""
        problem, plan = self.problem, self.plan
        constants = {
            "HEADS": problem.queries.shape[2],
            "SHARE": problem.queries.shape[2] // problem.keys.shape[2],
            "D": problem.keys.shape[3],
            "E": problem.values.shape[3],
            "WIDE_D": next_power(problem.keys.shape[3]),
            "GROUP": plan.group,
            "BLOCK": plan.block,
            "BEFORE": plan.before,
            "TILE": tiles.rows,
            "WIDTH": self.width,
            "LOCAL": plan.local,
            "GROUPED": problem.alpha is not None,
            "UNIT": plan.unit,
            "PLACED": problem.packed is not None,
            "STARTED": problem.prior is not None,
        }
        return launch(
            getattr(kernels_of(KERNELS, self.interpret), name),
            (problem.queries, problem.keys, problem.values, *self.first, *self.scales, *more),
            outputs,
            grid=grid,
            constants=constants | more_constants,
            warps=tiles.warps,
            stages=tiles.stages,
            interpret=self.interpret,
        )

    def memories(self) -> tuple[Array, Array]:
        """The memory before every block, and after the last."""
        problem = self.problem
        prior = problem.prior
        initial = jnp.zeros(self._memory_shape) if prior is None else prior.memory.astype(jnp.float32)
        rows = SummedRows(
            problem.keys, problem.values, *self.first, jnp.zeros((1,)), self.folded, self.keep, scales=self.scales[1]
        )
        return self._scan(rows, initial, self.plan.before, prior is not None, reverse=False)

    def memory_gradients(self, cotangents: Array, after: Array) -> tuple[Array, Array]:
        """The gradient of the memory after every block, and of the memory before the row."""
        problem = self.problem
        factors = jnp.zeros((problem.queries.shape[2],)) if problem.alpha is None else self.factors[0]
        own = problem.queries, cotangents
        rows = SummedRows(*own, *own, factors, self.reads, self.keep, scales=self.scales[0])
        return self._scan(rows, after.astype(jnp.float32), 0, False, reverse=True)

    @property
    def _memory_shape(self) -> tuple[int, int, int, int]:
        keys, values = self.problem.keys, self.problem.values
        return keys.shape[0], keys.shape[2], keys.shape[3], values.shape[3]

    def _scan(
        self, rows: SummedRows, initial: Array, shift: int, started: bool, *, reverse: bool
    ) -> tuple[Array, Array]:
        problem, plan = self.problem, self.plan
        nothing = jnp.zeros((1,))
        found = scan_memories(
            rows,
            Memories(initial, nothing),
            Scan(plan.length, plan.block, plan.blocks, shift, reverse),
            tiles=_tiles(problem, "memories"),
            interpret=self.interpret,
            UNIT=plan.unit,
            FACTORS=reverse,
            WEIGHTS=problem.packed is not None,
            STARTED=started,
        )
        return found[0].values, found[1].values


def _unit_scales(rows: Float[Array, "B T H D"], plan: AugmentedPlan) -> Float[Array, "B H T"]:
    """Factors that scale rows to length one, zero for zero rows; anything if rows are not scaled."""
    if not plan.unit:
        return jnp.zeros((1,))
    square = jnp.sum(jnp.square(rows.astype(jnp.float32)), axis=3)
    scale = jnp.where(square > 0, 1 / jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return scale.transpose(0, 2, 1)


def _tiles(problem: AugmentedProblem, kernel: str) -> Tiles:
    sizes = problem.keys.shape[3], problem.values.shape[3]
    return tiles_for(f"augmented_attention.{kernel}", *sizes, problem.keys.dtype, placed=problem.packed is not None)


def _summed(parts: Array, dtype: Any) -> Array:
    return parts[0].astype(dtype) if parts.shape[0] == 1 else jnp.sum(parts, axis=0).astype(dtype)


def _struct(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)
