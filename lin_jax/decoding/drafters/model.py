"""Drafters that run a model over the tree: a small one of its own, or some layers of the target."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lin_jax.attention import tree_arrays
from lin_jax.decoding.draft import DraftContext, Guesses, Layer, Stateless, best_guesses
from lin_jax.models import CausalModel


class _Running(nnx.Module):
    """What both have in common: the model verifies the tree so far anew at every depth."""

    lookback = 0

    def __init__(self, model: CausalModel, depth: int, width: int) -> None:
        self.model = model
        self.depth = depth
        self.width = min(width, model.config.vocab_size or width)

    def scores(self, shared: Any, carried: None, layer: Layer) -> tuple[Float[Array, "B K V"], None]:
        """The model's logits after each node of the layer; `shared` is its state."""
        hidden, _ = self.model.verify(jnp.maximum(layer.above, 0), layer.tree, shared)
        return self.model.logits(hidden[:, -layer.tokens.shape[1] :]), carried

    def expand(self, shared: Any, carried: None, layer: Layer) -> tuple[Guesses, None]:
        """The model's best tokens after each node."""
        logits, carried = self.scores(shared, carried, layer)
        return best_guesses(logits, layer), carried


class ModelDrafter(_Running):
    """A small model with a recurrent state of its own (Leviathan et al. 2023; Chen et al. 2023).

    Args:
        model: any causal model with the target's vocabulary.
        depth: how deep to draft.
        width: how many children a node may be given.
    """

    def __init__(self, model: CausalModel, *, depth: int = 4, width: int = 10) -> None:
        super().__init__(model, depth, width)

    def init_state(self, batch: int, capacity: int) -> Any:
        """The model's state before the first token."""
        return self.model.init_state(batch, capacity)

    def read(self, state: Any, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]) -> Any:
        """The model reads the prompt."""
        return self.model.prefill(tokens, lengths, state)[1]

    def commit(self, state: Any, path: Int[Array, "B P"], length: Int[Array, " B"]) -> Any:
        """The model takes the accepted path in, as a tree without branches."""
        count = path.shape[1]
        nodes = self.model.verify(jnp.maximum(path, 0), tree_arrays(tuple(range(-1, count - 1))), state)[1]
        order = jnp.broadcast_to(jnp.arange(count), path.shape)
        return self.model.commit(state, nodes, order, length)

    def begin(self, context: DraftContext, state: Any) -> tuple[Any, None]:
        """The model's state serves all nodes."""
        del context
        return state, None


class SelfDrafter(_Running, Stateless):
    """Some of the target's own layers, on their part of the target's own state (LayerSkip, Elhoushi et al. 2024).

    The first layers see exactly what they see in the target; layers after a gap see something else, and guess all the
    same.

    Args:
        target: the target.
        layers: numbers of the layers to run, in order.
        depth: how deep to draft.
        width: how many children a node may be given.
    """

    def __init__(self, target: CausalModel, layers: Sequence[int], *, depth: int = 4, width: int = 10) -> None:
        super().__init__(target.with_layers(layers), depth, width)
        self.layers = tuple(layers)

    def begin(self, context: DraftContext, state: Any) -> tuple[Any, None]:
        """The part of the target's state that belongs to the layers."""
        del state
        first, last = self.layers[0], self.layers[-1] + 1
        if self.layers == tuple(range(first, last)):
            return jax.tree.map(lambda leaf: leaf[first:last], context.target), None
        return jax.tree.map(lambda leaf: leaf[jnp.asarray(self.layers)], context.target), None
