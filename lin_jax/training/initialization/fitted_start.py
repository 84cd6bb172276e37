"""The start of a student from its teacher: what can be fitted before the first step, without gradients."""

import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from lin_jax.attention import QKV, Layout
from lin_jax.attention.full import FullAttention
from lin_jax.attention.memory_start import MemoryShares, can_fit, fit_memory
from lin_jax.losses.cross_entropy import Batch, inputs_of
from lin_jax.models.mixed_stack import MixedStack
from lin_jax.models.prenorm_block import PreNormBlock
from lin_jax.models.stack import LayerStack
from lin_jax.training.objectives.attention_transfer import layout_of

log = logging.getLogger(__name__)

# Rows of a batch that memories are fitted to, at most.
ROWS = 8


class FittedStart(NamedTuple):
    """A student whose memories are fitted.

    Attributes:
        model: the student.
        shares: by the number of the layer, the memory's share of the normaliser; of layers that were fitted.
    """

    model: Any
    shares: dict[int, MemoryShares]


def fitted_start(
    student: Any,
    teacher: Any,
    batch: Batch,
    layers: tuple[int, int] | None,
    seed: int,
    context_length: int | None = None,
) -> FittedStart:
    """Fits the memories behind windows to a softmax teacher, layer by layer, from one batch.

    A layer is fitted where its balances are zero, as they are before any training, so that what has learnt stays; and
    where the teacher's attention is softmax over all that came before.

    Args:
        student: the model; it is not changed.
        teacher: of the same sizes.
        batch: a batch of text, of which a few rows are read.
        layers: the first layer and the one after the last; None is all.
        seed: draws first centres.
        context_length: positions that rows are spread over, for models with rotary positions; None begins rows at 0.
    """
    first, end = layers or (0, student.layers.count)
    student = nnx.clone(student)
    wanted = [number for number in range(first, end) if _is_new(_mixer(student.layers, number))]
    shares: dict[int, MemoryShares] = {}
    if not wanted:
        return FittedStart(student, shares)
    few = {name: rows[:ROWS] for name, rows in batch.items()}
    if context_length is not None:
        # The same rows at several places.
        few = {name: jnp.concatenate([jnp.asarray(rows)] * -(-ROWS // len(rows)))[:ROWS] for name, rows in few.items()}
    layout = layout_of(few)
    tokens, positions = jnp.asarray(inputs_of(few)[0]), layout.positions
    if context_length is not None:
        last = max(context_length - tokens.shape[1], 0)
        positions = positions + jnp.linspace(0, last, tokens.shape[0]).astype(jnp.int32)[:, None]
    hidden, context = teacher.begin(tokens, positions)
    for number in range(wanted[-1] + 1):
        hidden, qkv = _layer(teacher.layers.selected([number]), hidden, context, layout)
        if number in wanted and _is_softmax(teacher.layers, number):
            key = jax.random.fold_in(jax.random.key(seed), number)
            mixer, shares[number] = _fit(_mixer(student.layers, number), qkv, layout, key, positions)
            _put(student.layers, number, mixer)
    return FittedStart(student, shares)


def describe(shares: dict[int, MemoryShares]) -> str:
    """Says what memories start with, in one line."""
    teacher, before, after = (
        float(np.mean([np.mean(getattr(each, name)) for each in shares.values()])) for name in MemoryShares._fields
    )
    return (
        f"memories of {len(shares)} layers fitted to the teacher: of the attention beyond the window, {teacher:.1%} of "
        f"the teacher's, they start with {after:.1%} in place of {before:.1%}"
    )


@jax.jit
def _layer(layer: LayerStack, x: Float[Array, "B T E"], context: Any, layout: Layout) -> tuple[Array, QKV]:
    """The output of a stack of one layer, and the queries, keys and values of its attention."""

    def apply(block: PreNormBlock, x: Array, _: None) -> tuple[Array, QKV]:
        qkv = block.attention.project(block.attention_norm(x), context)
        return block.parallel(x, context, layout, None)[0], qkv

    hidden, qkv = layer(apply, x, None)
    stacked = qkv.in_order() if hasattr(qkv, "in_order") else qkv
    return hidden, jax.tree.map(lambda part: part[0], stacked)


@jax.jit
def _fit(mixer: Any, qkv: QKV, layout: Layout, key: Array, positions: Array) -> Any:
    return _whole(fit_memory(mixer, qkv, layout, key, positions))


def _whole(found: Any) -> Any:
    """Arrays that every device has the whole of, so that every process can read them."""
    if all(size == 1 for size in jax.sharding.get_abstract_mesh().shape.values()):
        return found
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, PartitionSpec()), found)


def _mixers(stack: LayerStack, number: int) -> tuple[Any, int]:
    """The stacked mixers that a layer's is among, and its place there."""
    if isinstance(stack, MixedStack):
        kind = stack.order[number]
        return stack.mixers[kind], stack.order[:number].count(kind)
    return stack.layers.attention.mixer, number


def _mixer(stack: LayerStack, number: int) -> Any:
    """The mixer of a layer; parameters are copies."""
    stacked, at = _mixers(stack, number)
    graph, state = nnx.split(stacked)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[at], state))


def _put(stack: LayerStack, number: int, mixer: Any) -> None:
    """Gives a layer another mixer's parameters, in place."""
    stacked, at = _mixers(stack, number)
    before, own = nnx.state(stacked), nnx.state(mixer)
    nnx.update(stacked, jax.tree.map(lambda all_, one: all_.at[at].set(one.astype(all_.dtype)), before, own))


def _is_new(mixer: Any) -> bool:
    """True for a memory behind a window that nothing has been learnt of."""
    return can_fit(mixer) and not bool(jnp.any(mixer.balance[...] != 0))


def _is_softmax(stack: LayerStack, number: int) -> bool:
    mixer = _mixers(stack, number)[0]
    return isinstance(mixer, FullAttention) and mixer.weights == "softmax"
