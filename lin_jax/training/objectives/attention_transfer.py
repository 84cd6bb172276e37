"""Attention transfer: every layer's new attention learns to say what the teacher's attention says there."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lin_jax.attention import Layout, packed_rows, single_rows
from lin_jax.errors import UserError
from lin_jax.losses.cross_entropy import Batch, Sums, inputs_of
from lin_jax.models.adapters import AdapterConfig
from lin_jax.models.mixed_stack import pairwise
from lin_jax.models.params import Params, filled
from lin_jax.models.prenorm_block import PreNormBlock
from lin_jax.models.stack import LayerStack
from lin_jax.training.objectives.next_token import NextToken
from lin_jax.training.objectives.objective import PartRate
from pallas_kernels.precision import accumulation_dtype


class AttentionTransfer(NextToken):
    """Mean squared error between what a layer's attention and the teacher's add to the residual stream.

    Both read the same hidden vectors, so that every layer learns on its own and errors do not pile up. These vectors
    are the teacher's: what its layers before have made of the text. Progressive transfer takes, up to the first layer
    that learns, the student's layers instead; from there on, the teacher's go on from what those have made of it.

    Outputs are compared behind the projection out of the heads. That is what the rest of the model gets to see: what
    the projection drops does not matter, and what it enlarges does; and an attention without a normaliser, whose
    outputs are of another size, finds its scale in the projection, if that learns.

    The loss is `sum_l mean_t |student_l - teacher_l|^2 / E` over the layers l that learn and all tokens t but padding.
    The sums are `[2 L]`: the squared errors of L layers, and with weight zero the teacher's squares, to divide by.

    A student's softmax window soon says most of what the teacher says, and then a linear memory beside it has little
    to learn from. Window dropout narrows the window of a layer at random, in training alone: a mixer that has a method
    `narrowed(tokens)` gives itself with a window of so many tokens, over the same parameters.

    Behind rotary positions, a softmax teacher says the same wherever a row begins, but a memory reads keys as their own
    positions have turned them, and fails beyond the positions that it has learnt from. With a context length, rows
    begin anywhere in it, in training alone.

    Args:
        config: the student's model.
        adapters: on the student, or None.
        layers: the first layer that learns and the one after the last; None is all.
        progressive: whether the layers before them are the student's.
        window_dropout: probability with which a layer's window is narrowed in a step.
        narrowed_window: tokens of a narrowed window.
        context_length: the positions that rows lie within, wherever they begin; None begins them at 0.
    """

    rates: Mapping[str, PartRate] = {}

    def __init__(
        self,
        config: Any,
        adapters: AdapterConfig | None = None,
        *,
        layers: tuple[int, int] | None = None,
        progressive: bool = False,
        window_dropout: float = 0.0,
        narrowed_window: int = 1,
        context_length: int | None = None,
    ) -> None:
        super().__init__(config, adapters)
        stack = getattr(self._abstract, "layers", None)
        if not (isinstance(stack, LayerStack) and isinstance(stack.layers, PreNormBlock)):
            kind = type(self._abstract).__name__
            raise UserError(f"objective 'attention_transfer' is for LLaMA and GPT-2, and the model is a {kind}")
        self._first, self._end = (0, int(config.num_layers)) if layers is None else layers
        self._progressive = progressive
        if window_dropout and not _has_window(stack):
            raise UserError(
                f"transfer.window_dropout {window_dropout} is for attention with a softmax window beside a memory, and "
                f"'{config.attention.name}' has none; leave it out"
            )
        self._window_dropout, self._narrowed_window = window_dropout, narrowed_window
        if context_length is not None and not hasattr(config, "rotary"):
            kind = type(self._abstract).__name__
            raise UserError(
                f"transfer.context_length {context_length} is for models with rotary positions, and a {kind} has a "
                "vector for each; leave it out"
            )
        self._context_length = context_length
        count = self._end - self._first
        self.coefficients = (1.0,) * count + (0.0,) * count

    def counts(self, batch: Batch) -> Int[Array, " K"]:
        """Tokens that are no padding, for every layer."""
        return jnp.broadcast_to(jnp.sum(layout_of(batch).valid), (len(self.coefficients),))

    def sums(self, params: Params, frozen: Params, batch: Batch) -> Sums:
        """Sums `[2 L]` over the tokens of a batch: squared errors, and squares of what the teacher says."""
        return self._sums(params, frozen, batch, None, None)

    def training_sums(self, params: Params, frozen: Params, batch: Batch, key: Array) -> Sums:
        """The same sums, with the windows narrowed, and the first positions of rows, that a key draws."""
        narrow, begins = None, None
        if self._window_dropout:
            narrow = jax.random.bernoulli(key, self._window_dropout, (len(self.coefficients) // 2,))
        if self._context_length is not None:
            rows, length = inputs_of(batch)[0].shape
            last = max(self._context_length - length, 0)
            begins = jax.random.randint(jax.random.fold_in(key, 1), (rows, 1), 0, last + 1)
        return self._sums(params, frozen, batch, narrow, begins)

    def _sums(
        self,
        params: Params,
        frozen: Params,
        batch: Batch,
        narrow: Bool[Array, " L"] | None,
        begins: Int[Array, "B 1"] | None,
    ) -> Sums:
        student = filled(self._abstract, params)
        teacher = frozen["teacher"]
        layout = layout_of(batch)
        positions = layout.positions if begins is None else layout.positions + begins
        hidden, contexts = self._entering(student, teacher, batch, layout, positions)
        errors, squares = self._compared(student, teacher, hidden, contexts, layout, narrow)
        tokens = self.counts(batch)
        return Sums(jnp.concatenate([errors, squares]), jnp.zeros_like(tokens), tokens)

    def figures(self, sums: Sums) -> dict[str, float]:
        """The share of what the teacher says that is missed, in each layer."""
        count = len(sums.loss) // 2
        missed = [
            float(error) / max(float(square), 1e-30)
            for error, square in zip(sums.loss[:count], sums.loss[count:], strict=True)
        ]
        layers = {f"missed_layer_{self._first + number}": share for number, share in enumerate(missed)}
        return {"missed": sum(missed) / count, **layers}

    def _entering(
        self, student: Any, teacher: Any, batch: Batch, layout: Layout, positions: Int[Array, "#B T"]
    ) -> tuple[Array, tuple[Any, Any]]:
        """Computes the input of the first layer that learns, and the positions of student's and teacher's layers."""
        tokens = jnp.asarray(inputs_of(batch)[0])
        own, own_context = student.begin(tokens, positions)
        theirs, their_context = teacher.begin(tokens, positions)
        model, hidden, context = teacher, theirs, their_context
        if self._progressive:
            model, hidden, context = student, own, own_context
        if self._first:
            before = _between(model.layers, 0, self._first)
            hidden, _ = before(lambda block, x, _: block.parallel(x, context, layout, None), hidden, None)
        return jax.lax.stop_gradient(hidden), (own_context, their_context)

    def _compared(
        self,
        student: Any,
        teacher: Any,
        hidden: Float[Array, "B T E"],
        contexts: tuple[Any, Any],
        layout: Layout,
        narrow: Bool[Array, " L"] | None,
    ) -> tuple[Float[Array, " L"], Float[Array, " L"]]:
        """Sums over tokens of the mean squares over E: of what differs, and of what the teacher says, in each layer."""
        own_layers, their_layers = (_between(each.layers, self._first, self._end) for each in (student, teacher))
        included = layout.valid[..., None]

        def layer(
            own: PreNormBlock, theirs: PreNormBlock, x: Array, is_narrow: Array | None
        ) -> tuple[Array, tuple[Array, Array]]:
            expected, _ = theirs.attend(x, contexts[1], layout)
            if is_narrow is None or not _has_window(own):
                found, _ = own.attend(x, contexts[0], layout)
            else:
                found = jax.lax.cond(
                    is_narrow,
                    lambda: _narrowed(own, self._narrowed_window).attend(x, contexts[0], layout)[0],
                    lambda: own.attend(x, contexts[0], layout)[0],
                )
            squares = (jnp.square((found - expected).astype(wide)), jnp.square(expected.astype(wide)))
            sums = tuple(jnp.sum(jnp.where(included, jnp.mean(part, axis=-1, keepdims=True), 0)) for part in squares)
            return theirs.finish(x, expected), (sums[0], sums[1])

        wide = accumulation_dtype(hidden.dtype)
        return pairwise(own_layers, their_layers, layer, hidden, narrow)[1]


def layout_of(batch: Batch) -> Layout:
    """The layout of a batch's inputs, packed or one document a row."""
    tokens, segment_ids = inputs_of(batch)
    return single_rows(tokens.shape, None) if segment_ids is None else packed_rows(jnp.asarray(segment_ids))


def _has_window(layers: nnx.Module) -> bool:
    """True for layers with an attention whose softmax window can be narrowed."""
    able = (module for _, module in nnx.iter_modules(layers) if hasattr(module, "narrowed"))
    return any(getattr(module, "softmax", True) for module in able)


def _narrowed(block: PreNormBlock, tokens: int) -> PreNormBlock:
    """A layer over the same parameters whose window holds so many tokens."""
    block = nnx.merge(*nnx.split(block))
    block.attention.mixer = block.attention.mixer.narrowed(tokens)
    return block


def _between(stack: LayerStack, first: int, end: int) -> LayerStack:
    """Some neighbouring layers of a stack; the stack itself, without copies, where these are all."""
    return stack if (first, end) == (0, stack.count) else stack.selected(range(first, end))
