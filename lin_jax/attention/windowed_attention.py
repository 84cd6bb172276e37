"""Attention over a window and a linear memory of all that lies before it, in every form.

Under one normaliser (LoLCATs, Zhang et al. 2025; Based, Arora et al. 2024):

`o_t = (sum_{s near t} e^{c q_t·k_s} v_s + e^{b} sum_{s far} phi(q_t)·phi(k_s) d_ts v_s) / (the same sums of ones)`

with a learnt balance b for each head and the decay `d_ts = prod_{s<r<=t} a_r`, which is one without decay. Apart, where
the near branch is not softmax (or is missing): `o_t = sum_near a(q_t, k_s) v_s + alpha finish(sum_far ...)`.

Near are the tokens of a window and, for ever, the sinks, the first tokens of a document (Xiao et al. 2024).

The state has a constant size: the window's keys and values, `C K (D + E)` numbers, those of sinks, and the memory,
`K M (E + 1)`.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lin_jax.attention.bias import RelativeBias
from lin_jax.attention.composition import SourceMemory
from lin_jax.attention.convolution import Convolution
from lin_jax.attention.decay import Decay
from lin_jax.attention.layout import Layout
from lin_jax.attention.linear import LinearBranch
from lin_jax.attention.local import LocalBranch
from lin_jax.attention.pairs import per_head, unit
from lin_jax.attention.protocols import Turn
from lin_jax.attention.windowed_kernels import (
    verify_by_program,
    verify_program,
    windowed_by_program,
    windowed_program,
)
from lin_jax.attention.windowed_state import WindowedState, advance, commit_path, held, in_order, sinks_of, with_sinks
from lin_jax.errors import UserError
from pallas_kernels.chunks import first_segment_id
from pallas_kernels.implementations import target_platform
from pallas_kernels.pairs import merge_heads, split_heads, weighted_values
from pallas_kernels.precision import accumulation_dtype, upcast
from pallas_kernels.types import QKV, TreeArrays
from pallas_kernels.window_verify.problem import tree_ages
from pallas_kernels.windows.clock import SplitSums, between
from pallas_kernels.windows.normaliser import normalised
from pallas_kernels.windows.rows import Before, Pairs, TokenPlaces, WindowedRows, WindowNodes
from pallas_kernels.windows.window import AttentionWindow, NearFarMasks


class WindowedAttention(nnx.Module):
    """A window and a memory, in every form.

    Args:
        heads: query heads H.
        kv_heads: key/value heads K.
        head_dim: size D of queries and keys.
        value_dim: size E of values.
        window: the tokens that are near.
        softmax: whether near pairs and the memory share a normaliser, by softmax.
        near: otherwise, weights of near pairs apart from the memory; None leaves them out.
        linear: feature map of the memory, and what becomes of its sums where they stand apart; if it reaches all keys,
            near pairs beside a branch of their own count twice.
        scale: factor of q·k in softmax.
        decay: of the memory, or None.
        convolution: added to the outputs, or None.
        initial_alpha: start of the memory's learnt factor beside a near branch of its own; None is no factor.
        unit_inputs: scale queries and keys to length one before all else.
        turn: rotary positions, where queries and keys come as they were before them: near pairs are scored turned, and
            the memory reads what is not. None where they come turned, or have no such positions.
        implementation: of `pallas_kernels.windowed_attention`, where it computes this attention over whole rows.
        param_dtype: type of the parameters.
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        *,
        window: AttentionWindow,
        linear: LinearBranch,
        softmax: bool = False,
        near: LocalBranch | None = None,
        scale: float = 1.0,
        decay: Decay | None = None,
        convolution: Convolution | None = None,
        initial_alpha: float | None = None,
        unit_inputs: bool = False,
        turn: Turn | None = None,
        implementation: str | None = None,
        param_dtype: Any = jnp.float32,
    ) -> None:
        self.kv_heads, self.head_dim, self.value_dim = kv_heads, head_dim, value_dim
        self.window, self.near, self.linear, self.decay = window, near, linear, decay
        self.scale = scale
        self.convolution = convolution
        self.unit_inputs, self.implementation, self.turn = unit_inputs, implementation, turn
        self.alpha = None if initial_alpha is None else nnx.Param(jnp.full((1,), initial_alpha, param_dtype))
        self.softmax = softmax
        self.balance = nnx.Param(jnp.zeros((kv_heads, heads // kv_heads), param_dtype)) if softmax else None

    def narrowed(self, tokens: int) -> "WindowedAttention":
        """This attention, of the same parameters and sinks, with a sliding window of so many tokens."""
        return self._with_window(AttentionWindow(tokens, sinks=self.window.sinks))

    def ablations(self) -> tuple[str, ...]:
        """Names of the branches that it can be without."""
        named = {"window": self.softmax, "memory": self.softmax, "convolution": self.convolution is not None}
        named["sinks"] = self.window.sinks > 0
        return tuple(name for name, there in named.items() if there)

    def without(self, branch: str) -> "WindowedAttention":
        """This attention without a branch: a window of the query's own token, an empty memory, no convolution.

        Without its sinks, these tokens enter the memory.
        """
        if branch == "window":
            return self.narrowed(1)
        if branch == "sinks":
            return self._with_window(replace(self.window, sinks=0))
        other = nnx.merge(*nnx.split(self))
        if branch == "convolution":
            other.convolution = None
        else:
            assert other.balance is not None, "softmax is balanced with the memory"
            other.balance = nnx.Param(jnp.full_like(other.balance[...], -jnp.inf))
        return other

    def _with_window(self, window: AttentionWindow) -> "WindowedAttention":
        other = nnx.merge(*nnx.split(self))
        other.window = window
        return other

    def init_state(self, batch: int, capacity: int, dtype: Any) -> WindowedState:
        """The empty state; its size does not depend on `capacity`, the longest text."""
        del capacity
        wide, slots = accumulation_dtype(dtype), (batch, self.window.capacity, self.kv_heads)
        width = 0 if self.convolution is None else self.convolution.width - 1
        sinks = (batch, self.window.sinks, self.kv_heads)
        return WindowedState(
            memory=self._empty_memory(batch, dtype),
            keys=jnp.zeros((*slots, self.head_dim), dtype),
            values=jnp.zeros((*slots, self.value_dim), dtype),
            decays=None if self.decay is None else jnp.zeros(slots, wide),
            convolved=None
            if self.convolution is None
            else jnp.zeros((batch, width, self.kv_heads, self.value_dim), dtype),
            position=jnp.zeros((batch,), jnp.int32),
            sink_keys=jnp.zeros((*sinks, self.head_dim), dtype) if self.window.sinks else None,
            sink_values=jnp.zeros((*sinks, self.value_dim), dtype) if self.window.sinks else None,
        )

    def parallel(
        self,
        qkv: QKV,
        layout: Layout,
        state: WindowedState | None = None,
        bias: RelativeBias | None = None,
    ) -> tuple[Float[Array, "B T H E"], WindowedState | None]:
        """Outputs for whole rows, a chunk at a time, and the state after them if one was given.

        The first document of a row continues the state; the state returned is that of the row's last document.
        """
        queries, tokens = self._inputs(qkv)
        if (program := self._program(qkv, layout, bias)) is not None:
            return self._by_program(program, qkv, tokens, layout, state)
        rows = WindowedRows.of(self.window, queries, tokens, *self._context(layout, state))
        whole = state is not None and not layout.continued
        initial = self._empty_memory(queries.shape[0], qkv.keys.dtype) if state is None else state.memory
        before, after = rows.memories(initial, self._fold, whole=whole)
        added = None
        if bias is not None:
            added = per_head(bias.between(rows.query_positions, rows.key_positions), self.kv_heads)
        pairs = rows.pairs(added, counts_near=self._counts_near)
        turned = self._turned(rows.queries, rows.query_positions, pairs, rows.key_positions)
        outputs = rows.flatten(self._outputs(rows.queries, pairs, rows.read(before, self.linear.recall), turned))
        if self.convolution is not None:
            kept = None if state is None else state.convolved
            outputs = outputs + self.convolution.parallel(qkv.values, layout, kept)
        new_state = None
        if state is not None and after is not None:
            new_state = advance(self.window, state, tokens, layout, after)
        return merge_heads(outputs).astype(qkv.values.dtype), new_state

    def _context(self, layout: Layout, state: WindowedState | None) -> tuple[TokenPlaces, Before | None]:
        """The places of rows' tokens, all alike where they can be, and what came before them."""
        readable, owners, positions = (
            jnp.where(layout.valid, layout.segment_ids, 0),
            layout.segment_ids,
            layout.positions,
        )
        first = first_segment_id(layout.segment_ids)
        if layout.aligned and layout.present is None and state is None:
            readable, owners, positions, first = readable[:1], owners[:1], positions[:1], first[:1]
        places = TokenPlaces(readable, owners, positions, first, layout.aligned)
        if state is None:
            return places, None
        tokens, slots = in_order(self.window, state)
        return places, Before(tokens, jnp.where(slots.mask, slots.positions, -1), sinks_of(state))

    def _program(self, qkv: QKV, layout: Layout, bias: RelativeBias | None) -> str | None:
        """The name of the operation's implementation that computes whole rows; None where it knows none of this."""
        if not self._has_kernels(bias):
            return None
        return windowed_program(self.linear.features, self.window, qkv, layout, self.implementation)

    def _verify_program(self, qkv: QKV, state: WindowedState, bias: RelativeBias | None) -> str | None:
        """The name of the kernels that compute a tree's nodes; None where plain XLA does."""
        if not self._has_kernels(bias):
            return None
        return verify_program(self.linear.features, self.window, qkv, state, self.implementation)

    def _has_kernels(self, bias: RelativeBias | None) -> bool:
        """True where near pairs and the memory share a normaliser and their vectors, and nothing is added to scores."""
        return self.balance is not None and not self.unit_inputs and self.turn is None and bias is None

    def _by_program(
        self, program: str, qkv: QKV, tokens: WindowNodes, layout: Layout, state: WindowedState | None
    ) -> tuple[Float[Array, "B T H E"], WindowedState | None]:
        """Outputs by the operation, and the state after the rows if one was given."""
        assert self.balance is not None, "near pairs and the memory are balanced"
        options = {"scale": self.scale, "balance": self.balance[...]}
        outputs, after = windowed_by_program(
            program, self.linear.features, self.window, qkv, tokens.decays, layout, state, **options
        )
        if self.convolution is not None:
            kept = None if state is None else state.convolved
            outputs = _plus(outputs, self.convolution.parallel(qkv.values, layout, kept))
        if state is None or layout.continued:
            return outputs, None
        return outputs, advance(self.window, state, tokens, layout, after)

    def _verify_by_program(
        self, program: str, qkv: QKV, nodes: WindowNodes, tree: TreeArrays, state: WindowedState
    ) -> Float[Array, "B N H E"]:
        """Outputs of a tree's nodes by kernels."""
        assert self.balance is not None, "near pairs and the memory are balanced"
        options = {"scale": self.scale, "balance": self.balance[...]}
        outputs = verify_by_program(
            program, self.linear.features, self.window, qkv, nodes.decays, tree, state, **options
        )
        if self.convolution is None or state.convolved is None:
            return outputs
        return _plus(outputs, self.convolution.verify(qkv.values, tree.depth, tree.ancestors, state.convolved))

    def verify(
        self,
        qkv: QKV,
        tree: TreeArrays,
        state: WindowedState,
        bias: RelativeBias | None = None,
    ) -> tuple[Float[Array, "B N H E"], WindowNodes]:
        """Outputs for the nodes of a tree on top of the state.

        What lies before a node's window, though it is not in the memory yet, counts through the feature map.
        """
        queries, nodes = self._inputs(qkv)
        if (program := self._verify_program(qkv, state, bias)) is not None:
            return self._verify_by_program(program, qkv, nodes, tree, state), nodes
        slots = held(self.window, state.position)
        positions = state.position[:, None] + tree.depth
        known, early = with_sinks(state, slots)
        key_positions = jnp.concatenate([early.positions, positions], axis=1)
        ancestors = jnp.broadcast_to(tree.ancestors, (*positions.shape, positions.shape[1]))
        ring = jnp.broadcast_to(early.mask[:, None], (*positions.shape, early.mask.shape[1]))
        masks = self.window.masks(positions, key_positions, jnp.concatenate([ring, ancestors], axis=2))
        if positions.shape[1] == 1 and self.window.tokens != 0:
            masks = masks._replace(far=None)
        masks = self._reach(masks)
        tokens = WindowNodes(
            jnp.concatenate([known.keys.astype(nodes.keys.dtype), nodes.keys], axis=1),
            jnp.concatenate([known.values.astype(nodes.values.dtype), nodes.values], axis=1),
            None,
        )
        read, factors = self.linear.recall(queries, state.memory), None
        if nodes.decays is not None and state.decays is not None:
            ages = tree_ages(slots, state.decays, nodes.decays, ancestors)
            read = read * jnp.exp(ages.path + ages.elapsed)[..., None, None].astype(read.dtype)
            if masks.far is not None:
                since = jnp.pad(-ages.since, ((0, 0), (self.window.sinks, 0), (0, 0)))
                sums = jnp.concatenate([since, ages.path], axis=1)
                factors = between(SplitSums.of(ages.path), SplitSums.of(sums), masks.far)
        between_positions = None
        if bias is not None:
            between_positions = per_head(bias.between(positions, key_positions), self.kv_heads)
        pairs = Pairs(tokens, masks, factors, between_positions)
        turned = self._turned(queries, positions, pairs, key_positions)
        if masks.far is not None and not self._counts_near:
            read = read + self._sums_of_leaving(queries, pairs, state)
            pairs = pairs._replace(masks=masks._replace(far=None), factors=None)
        outputs = self._outputs(queries, pairs, read, turned)
        if self.convolution is not None and state.convolved is not None:
            outputs = outputs + self.convolution.verify(qkv.values, tree.depth, tree.ancestors, state.convolved)
        return merge_heads(outputs).astype(qkv.values.dtype), nodes

    def commit(self, state: WindowedState, path: WindowNodes, length: Int[Array, " B"]) -> WindowedState:
        """The state after the first `length` nodes of the path, row by row."""
        return commit_path(self.window, state, path, length, self._fold)

    def bidirectional(self, qkv: QKV, layout: Layout, bias: RelativeBias | None = None) -> Float[Array, "B T H E"]:
        """Outputs for an encoder's rows: windows reach to both sides, the memory holds what is beyond them.

        Its sums are those over the whole document less the near pairs'. Rows that hold several documents are scored as
        one matrix of pairs.

        Raises:
            UserError: the memory decays, which has a direction.
        """
        if self.decay is not None:
            raise UserError("attention.decay is for causal models; set it to 'none' in an encoder")
        queries, tokens = self._inputs(qkv)
        near = self.window.both_sides(layout.positions, layout.pairs)
        between_positions = None
        if bias is not None:
            between_positions = per_head(bias.between(layout.positions, layout.positions), self.kv_heads)
        if layout.aligned:
            included = jnp.broadcast_to(layout.valid[..., None], (*layout.valid.shape, 1))
            memory = jax.lax.optimization_barrier(self._fold(tokens.keys, tokens.values, included))
            read = self.linear.recall(queries, memory)
            weights = self.linear.weights(queries, tokens.keys, near)
            beyond = jnp.any(layout.pairs & ~near, axis=-1)
            read = jnp.where(
                beyond[..., None, None, None], read - weighted_values(weights, self._extended(tokens.values)), 0
            )
            masks = NearFarMasks(near, None)
        else:
            read, masks = jnp.zeros((), accumulation_dtype(qkv.keys.dtype)), NearFarMasks(near, layout.pairs & ~near)
        outputs = self._outputs(queries, Pairs(tokens, masks, None, between_positions), read)
        if self.convolution is not None:
            outputs = outputs + self.convolution.bidirectional(qkv.values, layout)
        return merge_heads(outputs).astype(qkv.values.dtype)

    def condense(self, keys: Float[Array, "B S K D"], values: Float[Array, "B S K E"], layout: Layout) -> SourceMemory:
        """Sums an encoder's output up: all of it is far, and nothing decays."""
        keys = unit(keys) if self.unit_inputs else keys
        included = jnp.broadcast_to(layout.valid[..., None], (*layout.valid.shape, 1))
        memory = jax.lax.optimization_barrier(self._fold(keys, values, included))
        return SourceMemory(memory, None, layout.valid)

    def read(
        self, queries: Float[Array, "B T H D"], positions: Int[Array, "B T"], memory: SourceMemory
    ) -> Float[Array, "B T H E"]:
        """Outputs for a decoder's queries; their positions do not matter."""
        assert memory.memory is not None, "there is a memory"
        queries = split_heads(unit(queries) if self.unit_inputs else queries, self.kv_heads)
        return merge_heads(self._finished(self.linear.recall(queries, memory.memory))).astype(queries.dtype)

    @property
    def _counts_near(self) -> bool:
        """True where near pairs count as far ones too: the memory's branch reaches all keys beside a near one."""
        return self.near is not None and self.linear.reach != "earlier"

    def _reach(self, masks: NearFarMasks) -> NearFarMasks:
        return masks.with_near_among_far() if self._counts_near else masks

    def _inputs(self, qkv: QKV) -> tuple[Float[Array, "B T K R D"], WindowNodes]:
        queries, keys, values = qkv
        if self.unit_inputs:
            queries, keys = unit(queries), unit(keys)
        decays = None if self.decay is None else self.decay.logarithms(values)
        return split_heads(queries, self.kv_heads), WindowNodes(keys, values, decays)

    def _fold(self, keys: Array, values: Array, factors: Array | None) -> Array:
        """The addition of tokens to the memory, each times its factor `[..., S, K]`."""
        extended = self._extended(values)
        if factors is not None:
            extended = extended * factors[..., None].astype(extended.dtype)
        return self.linear.features.fold(keys, extended)

    def _extended(self, values: Array) -> Array:
        return self.linear.extended(upcast(values))

    def _outputs(
        self,
        queries: Float[Array, "*batch T K R D"],
        pairs: Pairs,
        read: Float[Array, "*#batch T K R E"],
        turned: tuple[Array, Pairs] | None = None,
    ) -> Float[Array, "*batch T K R E"]:
        """Outputs from pairs and from what was read from the memory.

        Args:
            queries: as the memory reads them.
            pairs: with keys as the memory reads them.
            read: what was read.
            turned: queries and pairs as near ones are scored, where they differ from these.
        """
        far = read if pairs.masks.far is None else read + self._far_sums(queries, pairs)
        if self.balance is not None:
            return self._normalised(queries, far, *(turned or (queries, pairs)))
        outputs = self._finished(far)
        if self.near is None:
            return outputs
        near = self.near.weights(queries, pairs.tokens.keys, pairs.masks.near, pairs.bias)
        outputs = outputs if self.alpha is None else self.alpha[...].astype(outputs.dtype) * outputs
        return weighted_values(near, pairs.tokens.values) + outputs

    def _turned(
        self,
        queries: Float[Array, "*batch T K R D"],
        positions: Int[Array, "*#batch T"],
        pairs: Pairs,
        key_positions: Int[Array, "*#batch S"],
    ) -> tuple[Array, Pairs] | None:
        """Queries and pairs as near ones are scored, turned by their positions; None where they came so."""
        if self.turn is None:
            return None
        keys = self.turn(pairs.tokens.keys, key_positions)
        return self.turn(queries, positions), pairs._replace(tokens=pairs.tokens._replace(keys=keys))

    def _far_sums(self, queries: Float[Array, "*batch T K R D"], pairs: Pairs) -> Float[Array, "*batch T K R E"]:
        """Sums over the far ones of some pairs, as the memory would have them."""
        assert pairs.masks.far is not None, "checked by the caller"
        weights = self.linear.weights(queries, pairs.tokens.keys, pairs.masks.far)
        weights = weights if pairs.factors is None else weights * pairs.factors.astype(weights.dtype)
        return weighted_values(weights, self._extended(pairs.tokens.values))

    def _sums_of_leaving(
        self, queries: Float[Array, "B N K R D"], pairs: Pairs, state: WindowedState
    ) -> Float[Array, "B N K R E"]:
        """Sums over the far pairs of a tree: tokens that leave the window on the way to a node."""
        nodes = queries.shape[1]
        if nodes <= (self.window.tokens or 0):
            # No node lies before the window of one below it, and few tokens of the ring do.
            return self._far_sums(queries, self._leaving(state, pairs, nodes - 1))
        if target_platform() == "gpu":
            # There the host would look at every condition, which takes longer than the sums.
            return self._far_sums(queries, pairs)
        # A group leaves at a time, and seldom within a tree.
        far = pairs.masks.far
        assert far is not None, "checked by the caller"
        absent = jnp.zeros_like(jax.eval_shape(lambda: self._far_sums(queries, pairs)))
        return jax.lax.cond(jnp.any(far), lambda: self._far_sums(queries, pairs), lambda: absent)

    def _leaving(self, state: WindowedState, pairs: Pairs, count: int) -> Pairs:
        """Those of a tree's pairs whose token is one of the `count` oldest of the ring, of a sliding window."""
        slots = (state.position[:, None] + jnp.arange(count)) % self.window.capacity
        index = slots[:, :, None, None]
        keys, values = (jnp.take_along_axis(part, index, axis=1) for part in (state.keys, state.values))
        places, factors = slots[:, None] + self.window.sinks, pairs.factors
        if factors is not None:
            factors = jnp.take_along_axis(factors, places[:, None, None], axis=-1)
        near, far = (None if mask is None else jnp.take_along_axis(mask, places, axis=-1) for mask in pairs.masks)
        assert near is not None, "there is a window"
        tokens = WindowNodes(keys.astype(pairs.tokens.keys.dtype), values.astype(pairs.tokens.values.dtype), None)
        return Pairs(tokens, NearFarMasks(near, far), factors, None)

    def _normalised(
        self,
        queries: Float[Array, "*batch T K R D"],
        far: Float[Array, "*batch T K R E_1"],
        near_queries: Float[Array, "*batch T K R D"],
        pairs: Pairs,
    ) -> Float[Array, "*batch T K R E"]:
        """Softmax of near pairs and the memory's sums, under one normaliser."""
        assert self.balance is not None, "near pairs and the memory are balanced"
        log_scale = self.linear.features.log_scale(queries) + self.balance[...].astype(far.dtype)
        return normalised(near_queries, pairs, far, log_scale, self.scale)

    def _finished(self, sums: Array) -> Array:
        return self.linear.finished(sums)

    def _empty_memory(self, batch: int, dtype: Any) -> Array:
        width = self.value_dim + self.linear.normalised
        return jnp.zeros((batch, self.kv_heads, self.linear.features.size, width), accumulation_dtype(dtype))


def _plus(outputs: Float[Array, "B T H E"], added: Float[Array, "B T K R E"]) -> Float[Array, "B T H E"]:
    """Outputs of kernels with what XLA adds to them."""
    return (upcast(outputs) + merge_heads(added)).astype(outputs.dtype)
