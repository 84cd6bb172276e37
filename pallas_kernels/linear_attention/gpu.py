"""Linear attention on GPU: Triton programs that run side by side, but for the memories before blocks.

How a decay ages rows and memories is worked out beforehand, as a weight for every row: kernels do not know documents'
clocks but for pairs of a block.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.gpu.launch import kernels_of, launch
from pallas_kernels.gpu.memories import Memories, Scan, SummedRows, scan_memories
from pallas_kernels.linear_attention.blocks import divisor
from pallas_kernels.linear_attention.problem import LinearGradients, LinearPlan, LinearProblem, Memory, PackedBlocks
from pallas_kernels.tiles import Tiles, block_rows, next_power, tiles_for

KERNELS = "pallas_kernels.linear_attention.gpu_kernels"
# Kernels with tiles of their own; all of them divide blocks.
TILED = ("memories", "outputs", "query_gradients", "key_gradients")


class LinearGpuResult(NamedTuple):
    """Results of the forward programs.

    Attributes:
        outputs: `[B, T, H, E]`.
        totals: `[B, T, H]` float32, the sums of weights.
        before: the memory before every block.
        after: the memory after the rows.
    """

    outputs: Float[Array, "B T H E"]
    totals: Float[Array, "B T H"]
    before: Memories
    after: Memory


def plan_for(problem: LinearProblem, floor: float | None) -> LinearPlan:
    """Blocks of whole tiles."""
    multiple = max(_tiles(problem, kernel).rows for kernel in TILED)
    length = problem.queries.shape[1]
    rows = block_rows("linear_attention", problem.keys.shape[3], problem.values.shape[3], problem.keys.dtype)
    return LinearPlan(min(rows, -(-length // multiple) * multiple), length, floor)


def forward(
    problem: LinearProblem, plan: LinearPlan, *, differentiated: bool = False, interpret: bool = False
) -> LinearGpuResult:
    """Outputs, and the memory after the rows in float32, and what `backward` goes on from."""
    call = _Call.of(problem, plan, interpret)
    ages = call.ages
    rows = SummedRows(problem.keys, problem.values, problem.keys, problem.values, ages.none, ages.folds, ages.keep)
    before, after = call.scan(rows, Memories(*problem.start), reverse=False)
    batch, length, heads, _ = problem.queries.shape
    size, tiles = problem.values.shape[3], _tiles(problem, "outputs")
    parts = -(-size // tiles.part)
    outputs, totals = call.launch(
        "outputs_kernel",
        (*before, call.log_decay, ages.reads, call.places, length, plan.blocks),
        (
            jax.ShapeDtypeStruct((batch, length, heads, size), problem.values.dtype),
            jax.ShapeDtypeStruct((batch, length, heads), jnp.float32),
        ),
        tiles,
        grid=(-(-length // tiles.rows) * parts, heads, batch),
        PART_D=tiles.piece,
        PART_E=tiles.part,
        PARTS=parts,
        FLOOR=plan.floor or 0.0,
    )
    return LinearGpuResult(outputs, totals, before, Memory(*after))


def backward(
    problem: LinearProblem,
    plan: LinearPlan,
    result: LinearGpuResult,
    cotangents: Float[Array, "B T H E"],
    after: Memory,
    *,
    interpret: bool = False,
) -> LinearGradients:
    """Gradients of the problem's arrays, given those of the outputs and of the memory after the rows."""
    call = _Call.of(problem, plan, interpret)
    ages = call.ages
    cotangents, totals = _cotangents(plan, result, cotangents)
    rows = SummedRows(
        problem.queries, cotangents, problem.queries, cotangents, ages.none, ages.reads, ages.keep, totals
    )
    memories, start = call.scan(rows, Memories(*(each.astype(jnp.float32) for each in after)), reverse=True)
    queries = _query_gradients(call, result.before, cotangents, totals)
    keys, values = _key_gradients(call, memories, cotangents, totals)
    return LinearGradients(queries, keys, values, Memory(*start))


def _cotangents(plan: LinearPlan, result: LinearGpuResult, cotangents: Array) -> tuple[Array, Array]:
    """Gradients of the sums and of their divisors (one number without division), given those of the outputs."""
    if plan.floor is None:
        return cotangents, jnp.zeros((1,))
    wide = cotangents.astype(jnp.float32) / divisor(result.totals, plan.floor)[..., None]
    slope = -jnp.sum(wide * result.outputs.astype(jnp.float32), axis=3)
    moves = result.totals > plan.floor if plan.floor else result.totals != 0
    return wide.astype(cotangents.dtype), jnp.where(moves, slope, 0)


def _query_gradients(call: "_Call", before: Memories, cotangents: Array, totals: Array) -> Array:
    problem, plan = call.problem, call.plan
    batch, length, heads, _ = problem.queries.shape
    tiles = _tiles(problem, "query_gradients")
    parts = -(-problem.values.shape[3] // tiles.part)
    dtype = problem.queries.dtype if parts == 1 else jnp.float32
    found = call.launch(
        "query_gradients_kernel",
        (*before, cotangents, totals, call.log_decay, call.ages.reads, call.places, length, plan.blocks),
        (jax.ShapeDtypeStruct((parts, *problem.queries.shape), dtype),),
        tiles,
        grid=(-(-length // tiles.rows) * parts, heads, batch),
        PART_E=tiles.part,
        PIECE_E=tiles.piece,
        PARTS=parts,
    )[0]
    return jnp.sum(found, axis=0).astype(problem.queries.dtype)


def _key_gradients(call: "_Call", memories: Memories, cotangents: Array, totals: Array) -> tuple[Array, Array]:
    problem, plan = call.problem, call.plan
    batch, length, kv_heads, _ = problem.keys.shape
    tiles = _tiles(problem, "key_gradients")
    parts = -(-problem.values.shape[3] // tiles.part)
    dtype = problem.keys.dtype if parts == 1 else jnp.float32
    keys, values = call.launch(
        "key_gradients_kernel",
        (*memories, cotangents, totals, call.log_decay, call.ages.folds, call.places, length, plan.blocks),
        (
            jax.ShapeDtypeStruct((parts, *problem.keys.shape), dtype),
            jax.ShapeDtypeStruct(problem.values.shape, problem.values.dtype),
        ),
        tiles,
        grid=(-(-length // tiles.rows) * parts, kv_heads, batch),
        PART_D=tiles.piece,
        PART_E=tiles.part,
        PIECE_E=tiles.piece,
        PARTS=parts,
    )
    return jnp.sum(keys, axis=0).astype(problem.keys.dtype), values


class _Ages(NamedTuple):
    """Decay weights of rows and memories; one number each if everything counts the same."""

    folds: Array  # [B, K, T] rows in the memory after their block
    reads: Array  # [B, K, T] the memory before a block in its rows
    keep: Array  # [B, K, n] the memory before a block in the one after it
    none: Array  # [1]


class _Call(NamedTuple):
    """A problem made ready for kernels."""

    problem: LinearProblem
    plan: LinearPlan
    interpret: bool
    places: Array  # [B, 2, T] documents and clock
    log_decay: Array  # [K]
    ages: _Ages

    @classmethod
    def of(cls, problem: LinearProblem, plan: LinearPlan, interpret: bool) -> "_Call":
        nothing = jnp.zeros((1,))
        log_decay = nothing if problem.log_decay is None else problem.log_decay.astype(jnp.float32)
        if problem.segment_ids is None and problem.log_decay is None:
            ages = _Ages(nothing, nothing, nothing, nothing)
            return cls(problem, plan, interpret, jnp.zeros((1,), jnp.int32), log_decay, ages)
        batch, length = problem.queries.shape[:2]
        segment_ids = problem.segment_ids
        whole = jnp.ones((batch, length), jnp.int32) if segment_ids is None else segment_ids
        packed = PackedBlocks.of(whole, plan)
        return cls(problem, plan, interpret, packed.rows, log_decay, _ages(packed, problem, plan))

    @property
    def _flags(self) -> dict[str, bool]:
        decays, placed = self.problem.log_decay is not None, self.problem.segment_ids is not None
        return {"DECAY": decays, "PLACED": placed, "AGED": decays or placed, "DIVIDED": self.plan.floor is not None}

    def launch(self, name: str, more: Any, outputs: Any, tiles: Tiles, *, grid: Any, **constants: Any) -> list[Array]:
        """Runs a kernel that reads queries, keys and values."""
        problem = self.problem
        return launch(
            getattr(kernels_of(KERNELS, self.interpret), name),
            (problem.queries, problem.keys, problem.values, *more),
            outputs,
            grid=grid,
            constants={
                "HEADS": problem.queries.shape[2],
                "SHARE": problem.queries.shape[2] // problem.keys.shape[2],
                "D": problem.keys.shape[3],
                "E": problem.values.shape[3],
                "WIDE_D": next_power(problem.keys.shape[3]),
                "BLOCK": self.plan.block,
                "TILE": tiles.rows,
            }
            | self._flags
            | constants,
            warps=tiles.warps,
            stages=tiles.stages,
            interpret=self.interpret,
        )

    def scan(self, rows: SummedRows, initial: Memories, *, reverse: bool) -> tuple[Memories, Memories]:
        """Memories before blocks, and after all."""
        plan, aged = self.plan, self._flags["AGED"]
        return scan_memories(
            rows,
            initial,
            Scan(plan.length, plan.block, plan.blocks, 0, reverse),
            tiles=_tiles(self.problem, "memories"),
            interpret=self.interpret,
            WEIGHTS=aged,
            AGED=aged,
            SUMMED=True,
            ADDED=not reverse or plan.floor is not None,
            EXTRAS=reverse,
        )


def _ages(packed: PackedBlocks, problem: LinearProblem, plan: LinearPlan) -> _Ages:
    """Weights of rows and memories, from segment ids and decay."""
    segment, time = packed.rows[:, 0], packed.rows[:, 1]
    block = jnp.arange(plan.length) // plan.block
    log_decay = jnp.zeros((1,)) if problem.log_decay is None else problem.log_decay.astype(jnp.float32)

    def aged(counts: Array, tokens: Array) -> Array:
        found = jnp.where(counts[:, None], jnp.exp(log_decay[:, None] * tokens[:, None]), 0)
        return jnp.broadcast_to(found, (found.shape[0], problem.keys.shape[2], found.shape[2]))

    before, after = packed.carried[:, block], packed.carried[:, block + 1]
    folds = aged((segment > 0) & (segment == after), packed.clock[:, block + 1] - time)
    reads = aged((segment > 0) & (segment == before), time - packed.clock[:, block])
    kept = packed.carried[:, :-1] == packed.carried[:, 1:]
    keep = aged(kept, packed.clock[:, 1:] - packed.clock[:, :-1])
    return _Ages(folds, reads, keep, jnp.zeros((1,)))


def _tiles(problem: LinearProblem, kernel: str) -> Tiles:
    sizes = problem.keys.shape[3], problem.values.shape[3]
    return tiles_for(f"linear_attention.{kernel}", *sizes, problem.keys.dtype, placed=problem.segment_ids is not None)
