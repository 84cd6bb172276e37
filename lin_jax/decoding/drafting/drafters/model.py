"""Drafters that run a model over the tree: a separate small one, or some layers of the target."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lin_jax.attention import tree_arrays
from lin_jax.decoding.drafting.api import DraftContext, Guesses, Stateless, TreeLevel, best_guesses
from lin_jax.models import CausalModel
from lin_jax.models.by_kind import ByKind


class _ModelOverTree(nnx.Module):
    """Base of both drafters: at every depth the model verifies the tree so far anew."""

    lookback = 0

    def __init__(self, model: CausalModel, depth: int, width: int) -> None:
        self.model = model
        self.depth = depth
        self.width = min(width, model.config.vocab_size or width)

    def scores(self, shared: Any, carried: None, level: TreeLevel) -> tuple[Float[Array, "B K V"], None]:
        """Logits of the model after each node of the level; `shared` is its state."""
        hidden, _ = self.model.verify(jnp.maximum(level.above, 0), level.tree, shared)
        return self.model.logits(hidden[:, -level.tokens.shape[1] :]), carried

    def expand(self, shared: Any, carried: None, level: TreeLevel) -> tuple[Guesses, None]:
        """Guesses the model's best tokens after each node."""
        logits, carried = self.scores(shared, carried, level)
        return best_guesses(logits, level), carried


class ModelDrafter(_ModelOverTree):
    """Drafts with a small model that has its own recurrent state (Leviathan et al. 2023; Chen et al. 2023).

    Args:
        model: any causal model with the target's vocabulary.
        depth: largest depth of a draft.
        width: largest number of children of a node.
    """

    def __init__(self, model: CausalModel, *, depth: int = 4, width: int = 10) -> None:
        super().__init__(model, depth, width)

    def init_state(self, batch: int, capacity: int) -> Any:
        """State of the model before the first token."""
        return self.model.init_state(batch, capacity)

    def prefill(self, state: Any, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]) -> Any:
        """Runs the model over a chunk of the prompts."""
        return self.model.prefill(tokens, lengths, state)[1]

    def commit(self, state: Any, path: Int[Array, "B P"], length: Int[Array, " B"]) -> Any:
        """Commits the accepted path to the model's state, as a tree without branches."""
        count = path.shape[1]
        nodes = self.model.verify(jnp.maximum(path, 0), tree_arrays(tuple(range(-1, count - 1))), state)[1]
        order = jnp.broadcast_to(jnp.arange(count), path.shape)
        return self.model.commit(state, nodes, order, length)

    def begin(self, context: DraftContext, state: Any) -> tuple[Any, None]:
        """Shares the model's state with all nodes."""
        del context
        return state, None


class SelfDrafter(_ModelOverTree, Stateless):
    """Drafts with some of the target's layers, on their part of its state (LayerSkip, Elhoushi et al. 2024).

    The first layers get exactly the input that they get in the target; layers after a gap get another one, which only
    makes their guesses worse.

    Args:
        target: the target.
        layers: indices of the layers to run, in order.
        depth: largest depth of a draft.
        width: largest number of children of a node.
    """

    def __init__(self, target: CausalModel, layers: Sequence[int], *, depth: int = 4, width: int = 10) -> None:
        super().__init__(target.with_layers(layers), depth, width)
        self.layers = tuple(layers)

    def begin(self, context: DraftContext, state: Any) -> tuple[Any, None]:
        """Shares the part of the target's state that belongs to the layers."""
        del state
        if isinstance(context.target, ByKind):
            return context.target.selected(self.layers), None
        first, last = self.layers[0], self.layers[-1] + 1
        if self.layers == tuple(range(first, last)):
            return jax.tree.map(lambda leaf: leaf[first:last], context.target), None
        return jax.tree.map(lambda leaf: leaf[jnp.asarray(self.layers)], context.target), None
