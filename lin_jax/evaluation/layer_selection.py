"""Layers ranked by what a linearized model gains where its teacher's attention comes back in one of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lin_jax.attention import AttentionConfig, Layout, packed_rows, single_rows
from lin_jax.losses.chunked import sums_in_chunks
from lin_jax.losses.cross_entropy import Batch, inputs_of, shifted_targets
from lin_jax.models import CausalModel
from lin_jax.models.mixed_stack import pairwise
from lin_jax.models.prenorm_block import PreNormBlock

# Logits that each of student and teacher makes at once on a device.
LOGITS = 2**25
# In the place of a layer's number: the student as it is.
NONE = -1


@dataclass
class LayerDivergences:
    """Sums of KL(teacher || student) over held-out text, with the teacher's attention in one layer at a time.

    Attributes:
        layers: numbers of the layers; the first is `NONE`, the student as it is.
        sums: of each, in nats.
        tokens: how many tokens the sums are over.
        batches: how many batches have been read.
    """

    layers: list[int]
    sums: list[float]
    tokens: int = 0
    batches: int = 0

    @classmethod
    def of(cls, layers: Sequence[int]) -> "LayerDivergences":
        """Nothing known yet of some layers."""
        return cls([NONE, *layers], [0.0] * (1 + len(layers)))

    @property
    def untouched(self) -> float:
        """Mean divergence of the student as it is, in nats a token."""
        return self.means[NONE]

    @property
    def means(self) -> dict[int, float]:
        """Mean divergence in nats a token, by layer; `NONE` is that of the student as it is."""
        return {layer: total / max(self.tokens, 1) for layer, total in zip(self.layers, self.sums, strict=True)}

    @property
    def ranking(self) -> list[int]:
        """The layers, the one that brings the student closest to its teacher first."""
        means = self.means
        return sorted((layer for layer in self.layers if layer != NONE), key=lambda layer: means[layer])


class LayerChoice(NamedTuple):
    """Layers that keep their teacher's attention.

    Attributes:
        layers: their numbers, in order.
        attention: of the whole model: the teacher's in these layers, the student's own in the others.
        divergences: what each layer was chosen by.
    """

    layers: tuple[int, ...]
    attention: AttentionConfig
    divergences: LayerDivergences


def measure_layers(
    student: CausalModel,
    teacher: CausalModel,
    batches: Sequence[Batch],
    found: LayerDivergences,
    note: Callable[[], Any] = lambda: None,
) -> Iterator[LayerDivergences]:
    """Adds batches that have not been read yet to divergences, and yields them after every one.

    Args:
        student: the linearized model.
        teacher: the model that it was made from.
        batches: all batches of `tokens` and perhaps `segment_ids`, `[B, T+1]`.
        found: what is known so far.
        note: called after every pass of the student.
    """
    for batch in batches[found.batches :]:
        theirs, count = _teachers_hidden(teacher, dict(batch))
        for at, layer in enumerate(found.layers):
            found.sums[at] += float(_divergence(student, teacher, dict(batch), theirs, jnp.asarray(layer)))
            note()
        found.tokens += int(count)
        found.batches += 1
        yield found


@jax.jit
def _teachers_hidden(teacher: CausalModel, batch: Batch) -> tuple[Float[Array, "B T E"], Int[Array, ""]]:
    return teacher.hidden(*inputs_of(batch)), jnp.sum(shifted_targets(batch, 1).included)


@jax.jit
def _divergence(
    student: CausalModel, teacher: CausalModel, batch: Batch, theirs: Float[Array, "B T E"], layer: Int[Array, ""]
) -> Float[Array, ""]:
    """Sum of KL(teacher || student) over a batch's predicted tokens, the teacher's attention in one layer."""
    own = hidden_with(student, teacher, batch, layer)
    included = shifted_targets(batch, 1).included

    def sums(rows: Any) -> Array:
        own, theirs, included = rows
        logits, taught = (jax.nn.log_softmax(model.logits(x)) for model, x in ((student, own), (teacher, theirs)))
        return jnp.sum(jnp.where(included, jnp.sum(jnp.exp(taught) * (taught - logits), axis=-1), 0))

    return sums_in_chunks(sums, (own, theirs, included), vocabulary=student.embed.num_embeddings, max_logits=LOGITS)


def hidden_with(
    student: CausalModel, teacher: CausalModel, batch: Batch, layer: Int[Array, ""]
) -> Float[Array, "B T E"]:
    """The student's hidden vectors, with the teacher's attention, weights and all, in the layer of a number."""
    tokens, segment_ids = inputs_of(batch)
    tokens = jnp.asarray(tokens)
    layout = single_rows(tokens.shape, None) if segment_ids is None else packed_rows(jnp.asarray(segment_ids))
    x, context = student.begin(tokens, layout.positions)
    _, their_context = teacher.begin(tokens, layout.positions)

    def step(own: PreNormBlock, theirs: PreNormBlock, x: Array, number: Array) -> tuple[Array, None]:
        attended = jax.lax.cond(
            number == layer,
            partial(_attended, theirs, their_context, layout),
            partial(_attended, own, context, layout),
            x,
        )
        return own.finish(x, attended), None

    x, _ = pairwise(student.layers, teacher.layers, step, x, jnp.arange(student.layers.count))
    return student.finish(x)


def _attended(block: PreNormBlock, context: Any, layout: Layout, x: Array) -> Array:
    """The output of a layer's attention, in the type of its input, as both branches of a choice must have it."""
    return block.attend(x, context, layout)[0].astype(x.dtype)
