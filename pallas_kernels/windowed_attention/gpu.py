"""Attention over a window and a memory on GPU: Triton programs that run side by side, but for the memories.

Features are taken once, by XLA, before kernels that read them as rows of their own. Forward, sums of blocks leave the
memory before each, and one kernel computes all outputs; backward, the sums go in reverse, and two more kernels compute
gradients of queries, keys, values and features. Decays' gradients follow from products of features and their gradients:
a decay weighs all pairs that it lies between.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.gpu.launch import kernels_of, launch
from pallas_kernels.gpu.memories import Memories, Scan, SummedRows, scan_memories
from pallas_kernels.linear_attention.problem import Memory
from pallas_kernels.tiles import Tiles, block_rows, next_power, tiles_for
from pallas_kernels.windowed_attention.blocks import MapGradients, MappedRows, mapped, mapped_gradients
from pallas_kernels.windowed_attention.problem import (
    AttentionWindowPlan,
    FeatureWeights,
    WindowedGradients,
    WindowedPlan,
    WindowedProblem,
    WindowedResult,
    packed_windows,
)
from pallas_kernels.windows.clock import parts_of

KERNELS = "pallas_kernels.windowed_attention.gpu_kernels"
# Kernels with tiles of their own; all of them divide blocks.
TILED = ("memories", "outputs", "query_gradients", "key_gradients")


class KeptForBackward(NamedTuple):
    """Residuals of the forward pass, for the backward pass.

    Attributes:
        before: memories before blocks.
        after: the memory after the rows.
        outputs: `[B, T, H, E]`.
        totals: `[B, H, T]` logarithms of the sums of weights.
    """

    before: Memories
    after: Memories
    outputs: Array
    totals: Array


def plan_for(problem: WindowedProblem, window: AttentionWindowPlan) -> WindowedPlan:
    """Blocks of whole tiles."""
    multiple = max(_tiles(problem, kernel).rows for kernel in TILED)
    rows = block_rows("windowed_attention", problem.features, problem.values.shape[3], problem.keys.dtype)
    return WindowedPlan.of(problem, window, block=rows, multiple=multiple)


def forward(
    problem: WindowedProblem, plan: WindowedPlan, *, differentiated: bool = False, interpret: bool = False
) -> WindowedResult:
    """Outputs, and the memory after the rows; to be differentiated, also what `backward` goes on from."""
    call = _Call.of(problem, plan, interpret)
    before, after = call.memories()
    batch, length, heads, _ = problem.queries.shape
    size = problem.values.shape[3]
    tiles = _tiles(problem, "outputs")
    parts = -(-size // tiles.part)
    outputs, totals = call.launch(
        "outputs_kernel",
        (call.carried, before.values, before.keys, length, plan.blocks),
        (
            jax.ShapeDtypeStruct((batch, length, heads, size), problem.values.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ),
        tiles,
        grid=(-(-length // tiles.rows) * parts, heads, batch),
        WIDE_M=next_power(problem.features),
        PART_M=_piece(problem, tiles),
        PART_E=tiles.part,
        PARTS=parts,
    )
    kept = KeptForBackward(before, after, outputs, totals) if differentiated else None
    sums = totals if plan.window.sinks else None
    return WindowedResult(outputs, kept, Memory(after.values, after.keys), sums)


def backward(
    problem: WindowedProblem,
    plan: WindowedPlan,
    before: KeptForBackward,
    outputs: Float[Array, "B T H E"],
    after: Memory,
    totals: Float[Array, "B H T"] | None = None,
    *,
    interpret: bool = False,
) -> WindowedGradients:
    """Gradients, given what `forward` left, and gradients of what it returned."""
    call = _Call.of(problem, plan, interpret)
    means = jnp.sum(outputs.astype(jnp.float32) * before.outputs.astype(jnp.float32), axis=3).transpose(0, 2, 1)
    means = means if totals is None else means - totals
    later, memory = call.memory_gradients(outputs, means, before.totals, after)
    queries, asked = _query_gradients(call, before, outputs, means)
    keys, values, held = _key_gradients(call, later, before.totals, outputs, means)
    by_features = call.feature_gradients(asked, held)
    rows = keys + by_features.keys
    queries = (queries + by_features.queries).astype(problem.queries.dtype)
    own = slice(plan.before, None)
    decays = call.decay_gradients(asked, held, before.after, after)
    prior = None
    if problem.prior is not None:
        first = slice(None, plan.before)
        own_decays = None if decays is None else decays[:, first]
        prior = Memory(memory.values, memory.keys), rows[:, first], values[:, first], own_decays
    return WindowedGradients(
        queries=queries,
        keys=rows[:, own].astype(problem.keys.dtype),
        values=values[:, own].astype(problem.values.dtype),
        weights=by_features.weights,
        balance=jnp.sum(call.asked.rounded.astype(jnp.float32) * asked, axis=(0, 1, 3)),
        log_decays=None if decays is None else decays[:, own],
        prior=prior,
    )


def _query_gradients(call: "_Call", before: KeptForBackward, cotangents: Array, means: Array) -> tuple[Array, Array]:
    """Gradients of queries, without what comes by features, and of these; float32."""
    problem, plan = call.problem, call.plan
    batch, length, heads, _ = problem.queries.shape
    tiles = _tiles(problem, "query_gradients")
    piece = _piece(problem, tiles)
    parts = -(-problem.features // piece)
    found = call.launch(
        "query_gradients_kernel",
        (
            *(call.carried, before.before.values, before.before.keys),
            *(cotangents, before.totals, means, length, plan.blocks),
        ),
        [
            jax.ShapeDtypeStruct((*problem.queries.shape[:3], size), jnp.float32)
            for size in (problem.queries.shape[3], problem.features)
        ],
        tiles,
        grid=(-(-length // tiles.rows) * (parts + 1), heads, batch),
        WIDE_E=next_power(problem.values.shape[3]),
        PART_M=piece,
        PARTS=parts,
    )
    return found[0], found[1]


def _key_gradients(
    call: "_Call", later: Memories, totals: Array, cotangents: Array, means: Array
) -> tuple[Array, Array, Array]:
    """Gradients of keys, values and keys' features, behind those of the rows before the row; float32."""
    problem, plan = call.problem, call.plan
    batch, length, kv_heads, key_size = problem.keys.shape
    value_size = problem.values.shape[3]
    tiles = _tiles(problem, "key_gradients")
    piece = _piece(problem, tiles)
    parts = -(-problem.features // piece)
    early = plan.before if problem.prior is not None else 0
    whole = batch, plan.before + length, kv_heads
    found = call.launch(
        "key_gradients_kernel",
        (call.folds, later.values, later.keys, cotangents, totals, means, length, plan.blocks),
        [jax.ShapeDtypeStruct((*whole, size), jnp.float32) for size in (key_size, value_size, problem.features)],
        tiles,
        grid=((-(-length // tiles.rows) + early // tiles.rows) * (parts + 1), kv_heads, batch),
        WIDE_E=next_power(value_size),
        WIDE_M=next_power(problem.features),
        PART_M=piece,
        PARTS=parts,
    )
    if early == 0:
        # No program has these rows.
        found = [each.at[:, : plan.before].set(0) for each in found]
    return found[0], found[1], found[2]


class FeatureGradients(NamedTuple):
    """Gradients that come by features: of queries, of keys behind those before the row, and of the map."""

    queries: Array
    keys: Array
    weights: FeatureWeights


class _Call(NamedTuple):
    """A problem made ready for kernels; absent arrays are single numbers that no kernel reads."""

    problem: WindowedProblem
    plan: WindowedPlan
    interpret: bool
    keys: Array  # [B, P + T, K, D] with zeros where there is nothing, and before rows without a prior context
    asked: MappedRows  # [B, T, H, M]
    held: MappedRows  # [B, P + T, K, M]
    scales: Array  # [B, H, T] logarithms of what sums of far pairs are multiplied by
    places: Array  # [B, 3, P + T]
    carried: Array  # [B, n + 1]
    clock: Array  # [B, K, 2, P + T] coarse and fine parts
    folds: Array  # [B, K, P + T] how much of each row joins the memory
    folded: Array  # [B or 1, P + T] rows that do
    reads: Array  # [B or 1, T] queries of the memory's document
    keep: Array  # [B, K, n] what each block leaves of the memory

    @classmethod
    def of(cls, problem: WindowedProblem, plan: WindowedPlan, interpret: bool) -> "_Call":
        packed = packed_windows(problem, plan)
        index = jnp.arange(plan.before + plan.length)
        joins = jnp.minimum(index // plan.block, plan.blocks - 1)
        if packed is None:
            places = carried = jnp.zeros((1,), jnp.int32)
            there, folded = (index >= plan.before)[None], (index >= plan.before + plan.window.sinks)[None]
            reads, keep = jnp.ones((1, plan.length), bool), jnp.ones((1, plan.blocks), bool)
        else:
            places, carried = jnp.concatenate([packed.first, packed.rows], axis=2), packed.carried
            segment, position = places[:, 0], places[:, 1]
            there, own = segment > 0, segment[:, plan.before :]
            complete = (segment != carried[:, -1:]) | (position < packed.finished[:, None])
            complete &= position >= plan.window.sinks
            folded = there & (segment == carried[:, joins + 1]) & complete
            reads = (own > 0) & (own == carried[:, jnp.arange(plan.length) // plan.block])
            keep = carried[:, :-1] == carried[:, 1:]
        clock, folds, keep = _ages(_decays(problem, plan, there), folded, keep, plan, problem.keys.shape[2])
        keys = jnp.where(there[..., None, None], _joined(problem, plan, "keys"), 0)
        weights = problem.weights
        asked = _mapped_heads(problem.queries, weights.queries, weights.query_bias, plan, queries=True)
        held = _mapped_heads(keys, weights.keys, weights.key_bias, plan, queries=False)
        scales = (asked.log_scale[..., 0] + problem.balance).transpose(0, 2, 1)
        of_heads = problem.keys.shape[0], problem.keys.shape[2]
        folds, keep = (jnp.broadcast_to(each, (*of_heads, each.shape[2])) for each in (folds, keep))
        return cls(
            *(problem, plan, interpret, keys, asked, held, scales),
            *(places, carried, clock, folds, folded, reads, keep),
        )

    def launch(
        self, name: str, more: tuple[Any, ...], outputs: Any, tiles: Tiles, *, grid: Any, **more_constants: Any
    ) -> list[Array]:
        """Runs a kernel that reads queries, keys and values, and their features."""
        problem, plan = self.problem, self.plan
        window = plan.window
        constants = {
            "HEADS": problem.queries.shape[2],
            "SHARE": problem.queries.shape[2] // problem.keys.shape[2],
            "D": problem.keys.shape[3],
            "E": problem.values.shape[3],
            "M": problem.features,
            "WIDE_D": next_power(problem.keys.shape[3]),
            "SCALE": window.scale,
            "GROUP": window.group,
            "GROUPS": window.groups,
            "TOKENS": window.tokens or 0,
            "SINKS": window.sinks,
            "BLOCK": plan.block,
            "BEFORE": plan.before,
            "TILE": tiles.rows,
            "DECAYED": problem.log_decays is not None,
            "PLACED": problem.packed is not None,
            "STARTED": problem.prior is not None,
        }
        first_keys, first_values, own, first = self._first
        rows = problem.queries, problem.keys, problem.values, first_keys, first_values
        features = self.asked.rounded, own, first
        return launch(
            getattr(kernels_of(KERNELS, self.interpret), name),
            (*rows, *features, self.scales, self.clock, self.places, *more),
            outputs,
            grid=grid,
            constants=constants | more_constants,
            warps=tiles.warps,
            stages=tiles.stages,
            interpret=self.interpret,
        )

    @property
    def _first(self) -> tuple[Array, Array, Array, Array]:
        """Keys and values before the row, and features of the rows and of those before."""
        problem, before = self.problem, self.plan.before
        own, first = self.held.rounded[:, before:], self.held.rounded[:, :before]
        if problem.prior is None:
            return problem.keys, problem.values, own, own
        keys, values = (each.astype(problem.keys.dtype) for each in problem.prior[1:3])
        return keys, values, own, first

    def memories(self) -> tuple[Memories, Memories]:
        """The memories before blocks, and after the rows."""
        problem, prior = self.problem, self.problem.prior
        batch, _, kv_heads, _ = problem.keys.shape
        shape = batch, kv_heads, problem.features
        initial = Memories(jnp.zeros((*shape, problem.values.shape[3])), jnp.zeros(shape))
        if prior is not None:
            initial = Memories(*(each.astype(jnp.float32) for each in prior.memory))
        _, first_values, own, first = self._first
        nothing = jnp.zeros((1,))
        rows = SummedRows(own, problem.values, first, first_values, nothing, self.folds, self.keep)
        weighed = problem.packed is not None or problem.log_decays is not None or self.plan.window.sinks > 0
        flags = {"WEIGHTS": weighed, "AGED": weighed, "STARTED": prior is not None}
        return self._scan(rows, initial, self.plan.before, reverse=False, **flags)

    def memory_gradients(
        self, cotangents: Array, means: Array, totals: Array, after: Memory
    ) -> tuple[Memories, Memories]:
        """Gradients of the memories after blocks, and of the one before the rows."""
        problem, plan = self.problem, self.plan
        factor = jnp.where(self.reads[:, None], jnp.exp(jnp.minimum(self.scales - totals, 80.0)), 0)
        if problem.log_decays is not None:
            factor = factor * jnp.repeat(jnp.exp(self._query_clock), factor.shape[1] // problem.keys.shape[2], axis=1)
        factor = factor.transpose(0, 2, 1)
        upright = (cotangents.astype(jnp.float32) * factor[..., None]).astype(cotangents.dtype)
        extras = -means.transpose(0, 2, 1) * factor
        own = self.asked.rounded, upright
        ones = jnp.ones((problem.keys.shape[0], plan.length))
        rows = SummedRows(*own, *own, jnp.zeros((1,)), ones, self.keep, extras=extras)
        initial = Memories(*(each.astype(jnp.float32) for each in after))
        return self._scan(rows, initial, 0, reverse=True, WEIGHTS=True, EXTRAS=True)

    @property
    def _query_clock(self) -> Array:
        """The clock `[B, K, T]` of queries, from the beginning of their block's window."""
        plan = self.plan
        rows = jnp.arange(plan.length)
        end = (rows // plan.block + 1) * plan.block - plan.before
        total = self.clock[..., jnp.minimum(end + plan.before, self.clock.shape[3]) - 1]
        return jnp.sum(self.clock[..., plan.before :] + jnp.where(rows >= end, total, 0), axis=2)

    def _scan(
        self, rows: SummedRows, initial: Memories, shift: int, *, reverse: bool, **flags: bool
    ) -> tuple[Memories, Memories]:
        plan = self.plan
        return scan_memories(
            rows,
            initial,
            Scan(plan.length, plan.block, plan.blocks, shift, reverse),
            tiles=_tiles(self.problem, "memories"),
            interpret=self.interpret,
            SUMMED=True,
            ADDED=True,
            **flags,
        )

    def feature_gradients(self, asked: Array, held: Array) -> FeatureGradients:
        """Gradients that come by the features of queries and of keys, given those of the features."""
        problem, plan = self.problem, self.plan
        weights = problem.weights
        queries = _mapped_heads_gradients(problem.queries, self.asked, weights.queries, asked, plan, queries=True)
        keys = _mapped_heads_gradients(self.keys, self.held, weights.keys, held, plan, queries=False)
        biases = (
            None if bias is None else found[2]
            for bias, found in ((weights.query_bias, queries), (weights.key_bias, keys))
        )
        return FeatureGradients(queries[0], keys[0], FeatureWeights(queries[1], keys[1], *biases))

    def decay_gradients(self, asked: Array, held: Array, memory: Memories, after: Memory) -> Array | None:
        """Gradients `[B, P + T, K]` of the logarithms of decay: what is read after a token less what is kept after it.

        The memory after the rows is read at the last token that has joined it.
        """
        problem, plan = self.problem, self.plan
        if problem.log_decays is None:
            return None
        batch, whole, kv_heads, _ = held.shape
        read = jnp.sum(self.asked.rounded.astype(jnp.float32) * asked, axis=3)
        read = jnp.sum(read.reshape(batch, plan.length, kv_heads, -1), axis=3)
        kept = jnp.sum(self.held.rounded.astype(jnp.float32) * held, axis=3)
        moved = jnp.pad(read, ((0, 0), (plan.before, 0), (0, 0))) - kept
        last = jnp.max(jnp.where(self.folded, jnp.arange(whole), -1), axis=1)
        at_end = jnp.sum(memory.values * after.values, axis=(2, 3)) + jnp.sum(memory.keys * after.keys, axis=2)
        moved += jnp.where(jnp.arange(whole)[None, :, None] == last[:, None, None], at_end[:, None], 0)
        return jnp.cumsum(moved[:, ::-1], axis=1)[:, ::-1]


def _joined(problem: WindowedProblem, plan: WindowedPlan, name: str) -> Array:
    """Rows behind those before the row, or zeros."""
    rows = getattr(problem, name)
    if problem.prior is None:
        return jnp.pad(rows, ((0, 0), (plan.before, 0), *((0, 0),) * (rows.ndim - 2)))
    return jnp.concatenate([getattr(problem.prior, name).astype(rows.dtype), rows], axis=1)


def _decays(problem: WindowedProblem, plan: WindowedPlan, there: Bool[Array, "#B W"]) -> Array | None:
    if problem.log_decays is None:
        return None
    return jnp.where(there[:, None], jnp.swapaxes(_joined(problem, plan, "log_decays"), 1, 2), 0)


def _ages(
    decays: Float[Array, "B K W"] | None,
    folded: Bool[Array, "#B W"],
    keep: Bool[Array, "#B n"],
    plan: WindowedPlan,
    kv_heads: int,
) -> tuple[Array, Array, Array]:
    """The clock of rows, how much of them joins the memory, and what each block leaves of it."""
    whole, kept = folded[:, None].astype(jnp.float32), keep[:, None].astype(jnp.float32)
    if decays is None:
        # One for all heads.
        return jnp.zeros((1,)), whole, jnp.broadcast_to(kept, (keep.shape[0], kv_heads, plan.blocks))
    width = decays.shape[2]
    pieces = -(-width // plan.block)

    def cut(rows: Array) -> Array:
        padded = jnp.pad(rows, ((0, 0), (0, 0), (0, pieces * plan.block - width)))
        return padded.reshape(*rows.shape[:2], pieces, plan.block)

    parts = [jnp.cumsum(cut(part), axis=3).reshape(*decays.shape[:2], -1)[..., :width] for part in parts_of(decays)]
    clock = jnp.stack(parts, axis=2)
    joining = cut(jnp.where(folded[:, None], decays, 0))
    coarse, fine = (jnp.cumsum(part[..., ::-1], axis=3)[..., ::-1] - part for part in parts_of(joining))
    later = coarse + fine
    sums = jnp.sum(joining, axis=3)
    if pieces > plan.blocks:
        # What lies beyond the last block joins the memory with it.
        later = later.at[:, :, plan.blocks - 1].add(sums[:, :, plan.blocks :])
        sums = jnp.concatenate([sums[..., : plan.blocks - 1], sums[..., -2:].sum(-1, keepdims=True)], axis=2)
    later = later.reshape(*decays.shape[:2], -1)[..., :width]
    return clock, whole * jnp.exp(later), kept * jnp.exp(sums)


def _mapped_heads(
    rows: Float[Array, "B T H D"], weight: Array, bias: Array | None, plan: WindowedPlan, *, queries: bool
) -> MappedRows:
    """Features of all heads."""
    run = partial(mapped, plan=plan, queries=queries)
    over_heads = jax.vmap(run, in_axes=(1, 0, None if bias is None else 0), out_axes=1)
    biases = None if bias is None else bias[:, None]
    return jax.vmap(over_heads, in_axes=(0, None, None))(rows, jnp.swapaxes(weight, 1, 2), biases)


def _mapped_heads_gradients(
    rows: Float[Array, "B T H D"],
    found: MappedRows,
    weight: Array,
    upstream: Array,
    plan: WindowedPlan,
    *,
    queries: bool,
) -> tuple[Array, Array, Array]:
    """Gradients of rows, and of all heads' weights and biases."""
    run = partial(mapped_gradients, plan=plan, queries=queries)
    axes: Any = (1, 0, 0)
    over_heads = jax.vmap(run, in_axes=(1, 1, 0, 1), out_axes=MapGradients(*axes))
    own = jax.vmap(over_heads, in_axes=(0, 0, None, 0))(rows, found, jnp.swapaxes(weight, 1, 2), upstream)
    return own.rows, jnp.swapaxes(jnp.sum(own.weight, axis=0), 1, 2), jnp.sum(own.bias, axis=0)[:, 0]


def _tiles(problem: WindowedProblem, kernel: str) -> Tiles:
    size = problem.features if kernel == "memories" else problem.keys.shape[3]
    sizes = size, problem.values.shape[3]
    return tiles_for(f"windowed_attention.{kernel}", *sizes, problem.keys.dtype, placed=problem.packed is not None)


def _piece(problem: WindowedProblem, tiles: Tiles) -> int:
    """Features that a product takes at a time."""
    return min(tiles.piece, next_power(problem.features))
