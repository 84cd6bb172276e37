"""Sequence parallelism: rows lie along the axis `sequence` of a mesh, and every device has a piece of each row.

The state that linear attention goes on from is small, and its memory is a sum over tokens. So every device folds its
own piece, gets the sum of what the devices before it found in the document that its piece goes on with, fetches the
unfinished group and the convolution's window from its left neighbour, and goes on from there as from any other state.
What is sent does not grow with the text: for each row and layer about two memories `[K, M, E]`, G keys and values, and
W-1 values; the gradient sends as much.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from lin_jax.attention.bias import RelativeBias
from lin_jax.attention.layout import Layout
from lin_jax.errors import UserError
from pallas_kernels.mesh_axes import ROWS, SEQUENCE
from pallas_kernels.over_devices import axes_along, free_axes, over_devices
from pallas_kernels.pairs import EXACT
from pallas_kernels.types import QKV, AugmentedState


class Additive(Protocol):
    """A causal mixer whose memory is a sum over tokens, with its own way to keep and to fold tokens."""

    group_size: int
    linear: Any
    """None if there is no memory."""
    convolution: Any

    def scored(self, vectors: Array) -> Array:
        """Keys as a state keeps them."""

    def fold(self, keys: Array, values: Array, included: Array | None = None) -> Array:
        """The addition of tokens to the memory."""

    def parallel(
        self,
        qkv: QKV,
        layout: Layout,
        state: AugmentedState | None = None,
        bias: RelativeBias | None = None,
    ) -> tuple[Array, AugmentedState | None]:
        """Outputs of rows that go on from a state."""


def lies_cut(layout: Layout, group_size: int) -> bool:
    """True where rows lie along the mesh's axis, in pieces that can go on from a state.

    A state knows nothing of tokens that are not present. Where it would have to, the compiler cuts the program up.
    """
    count = free_axes().get(SEQUENCE, 1)
    whole_groups = layout.aligned and layout.positions.shape[1] % (count * group_size) == 0
    return count > 1 and (layout.present is None or whole_groups)


def over_sequence(
    mixer: Additive,
    qkv: QKV,
    layout: Layout,
    bias: RelativeBias | None,
) -> Float[Array, "B T H E"]:
    """Outputs of rows from their beginning on, a piece of each on every device along the axis.

    Rows are cut up for the axes along which they lie, too. Heads are left to the compiler, because some mixers norm all
    of them together, and to kernels, which cut them up themselves.

    Raises:
        UserError: the devices do not divide the row, or a piece is shorter than a group or the convolution's window.
    """
    length = _piece_length(mixer, qkv.keys.shape[1])
    whole_groups = layout.aligned and length % mixer.group_size == 0
    graph, parameters = nnx.split(mixer)

    def piece(parameters: Any, bias: Any, qkv: QKV, layout: Layout) -> Array:
        mixer = nnx.merge(graph, parameters)
        layout = replace(layout, aligned=whole_groups, continued=whole_groups)
        state = _entering(mixer, mixer.scored(qkv.keys), qkv.values, layout)
        return mixer.parallel(qkv, layout, state, bias)[0]

    along = axes_along(ROWS, qkv.keys.shape[0])
    nothing, rows = PartitionSpec(), PartitionSpec(along or None, SEQUENCE)
    cut = jax.shard_map(
        piece,
        in_specs=(nothing, nothing, rows, rows),
        out_specs=rows,
        axis_names={SEQUENCE, *along},
        check_vma=False,
    )
    return cut(parameters, bias, qkv, layout)


def _piece_length(mixer: Additive, length: int) -> int:
    count = free_axes()[SEQUENCE]
    if length % count:
        raise UserError(
            f"rows of {length} tokens cannot be cut for {count} devices along the mesh's axis '{SEQUENCE}'; "
            f"give a multiple of {count}"
        )
    reach = 0 if mixer.convolution is None else mixer.convolution.width - 1
    if length // count < max(mixer.group_size, reach):
        raise UserError(
            f"rows of {length} tokens leave {length // count} to each of {count} devices along the mesh's axis "
            f"'{SEQUENCE}', less than a group of {mixer.group_size} or the {reach} values that the convolution looks "
            "back; give longer rows or fewer devices"
        )
    return length // count


@dataclass(frozen=True)
class _Border:
    """Both ends of a piece.

    Attributes:
        position: `[B]` of the first token in its document; 0 too where there is none.
        tokens: `[B]` of the document that the piece ends with, as far as its end; 0 where there is none.
        last: `[B]` segment id of that document, 0 for padding.
        whole: `[B]` whether all of the piece is in a document that began before it.
        continues: `[n, n, B]` whether device i goes on with the document with which device j, before it, ends.
    """

    position: Int[Array, " B"]
    tokens: Int[Array, " B"]
    last: Int[Array, " B"]
    whole: Bool[Array, " B"]
    continues: Bool[Array, "n n B"]

    @classmethod
    def of(cls, layout: Layout) -> "_Border":
        segment_ids, positions = layout.segment_ids, layout.positions
        first, last = segment_ids[:, 0], segment_ids[:, -1]
        position = jnp.where(first > 0, positions[:, 0], 0)
        # No document has the number -1: nothing is gone on with.
        entered = jnp.where(position > 0, first, -1)
        entered_by, left_by = (jax.lax.all_gather(each, SEQUENCE) for each in (entered, last))
        earlier = jnp.tri(entered_by.shape[0], k=-1, dtype=bool)
        continues = earlier[..., None] & (entered_by[:, None] == left_by[None])
        tokens = jnp.where(last > 0, positions[:, -1] + 1, 0)
        return cls(position, tokens, last, entered == last, continues)


def _entering(mixer: Additive, keys: Array, values: Array, layout: Layout) -> AugmentedState:
    """The state that a piece begins from; keys as they are scored."""
    border = _Border.of(layout)
    window = None
    if mixer.convolution is not None:
        window = _halo(mixer.convolution.readable(values, layout), mixer.convolution.width - 1)
    held = None
    if layout.continued:  # No group is unfinished where a piece begins.
        group = (jnp.zeros((each.shape[0], mixer.group_size, *each.shape[2:]), each.dtype) for each in (keys, values))
    else:
        held = _halo(keys, mixer.group_size), _halo(values, mixer.group_size)
        group = (_by_slot(each, border.position % mixer.group_size) for each in held)
    memory = None
    if mixer.linear is not None:
        memory = _added(mixer, keys, values, layout, border, held)
        exchanged, (batch, heads) = (memory, border.continues), memory.shape[:2]
        memory = over_devices(_sum_before, exchanged, ("bkde", "ijb"), "bkde", rows=batch, heads=heads)
    held_keys, held_values = group
    return AugmentedState(memory, held_keys, held_values, window, border.position)


def _added(
    mixer: Additive, keys: Array, values: Array, layout: Layout, border: _Border, held: tuple[Array, Array] | None
) -> Float[Array, "B K M E"]:
    """A piece's addition to the memory: the groups that end in it, of the document with which it ends itself.

    Args:
        mixer: whose memory.
        keys: `[B, T, K, D]` as they are scored.
        values: `[B, T, K, E]`.
        layout: of the piece.
        border: its ends.
        held: the last G keys and values before it; None where it begins with a group and ends with one.
    """
    if held is None:
        return mixer.fold(keys, values, layout.present)
    size, position = mixer.group_size, border.position[:, None]
    finished = (border.tokens // size * size)[:, None]
    own = (layout.segment_ids > 0) & (layout.segment_ids == border.last[:, None]) & (layout.positions < finished)
    distance = jnp.arange(size, 0, -1)
    before = border.whole[:, None] & (distance <= position % size) & (position - distance < finished)
    return mixer.fold(keys, values, own) + mixer.fold(*held, before)


def _by_slot(held: Float[Array, "B G K E"], begun: Int[Array, " B"]) -> Float[Array, "B G K E"]:
    """The last `begun` of G tokens in the first slots; others hold anything."""
    size = held.shape[1]
    index = (jnp.arange(size) - begun[:, None]) % size
    return jnp.take_along_axis(held, index[:, :, None, None], axis=1)


def _halo(rows: Float[Array, "B T K E"], count: int) -> Float[Array, "B count K E"]:
    """The last tokens of the left neighbour's piece; zeros where there is none."""
    pairs = [(number, number + 1) for number in range(jax.lax.axis_size(SEQUENCE) - 1)]
    return jax.lax.ppermute(rows[:, rows.shape[1] - count :], SEQUENCE, pairs)


def _sum_before(exchanged: tuple[Float[Array, "B K M E"], Bool[Array, "n n B"]]) -> Float[Array, "B K M E"]:
    """The sum of those memories of other devices that each device continues.

    Every device sums up one n-th of all memories for everybody: two memories are sent, however many devices there are.
    To gather all would send, and hold, n of them; to add up in steps that double would send log n, one after another.
    """
    own, continues = exchanged
    count = continues.shape[0]
    batch, kv_heads, *sizes = own.shape
    numbers = own.reshape(batch, kv_heads, -1)
    padded = jnp.pad(numbers, ((0, 0), (0, 0), (0, -numbers.shape[2] % count)))
    parts = jnp.moveaxis(padded.reshape(batch, kv_heads, count, -1), 2, 0)
    parts = jax.lax.all_to_all(parts, SEQUENCE, 0, 0)
    sums = jnp.einsum("ijb,jbkp->ibkp", continues.astype(own.dtype), parts, precision=EXACT)
    found = jnp.moveaxis(jax.lax.all_to_all(sums, SEQUENCE, 0, 0), 0, 2).reshape(batch, kv_heads, -1)
    return found[..., : numbers.shape[2]].reshape(batch, kv_heads, *sizes)
