"""The decoder layer that LLaMA and GPT-2 share: attention and a feed-forward layer, each behind a norm of its input."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Int

from lin_jax.attention import Layout, TreeArrays


class PreNormBlock(nnx.Module):
    """One layer, in the forms of its token mixer (a `causal.CausalBlock`).

    Args:
        attention: projections around a mixer: `project(x, context)` to `QKV`, `merge(outputs)`.
        feed_forward: the feed-forward layer.
        norms: of the input of either.
    """

    def __init__(self, attention: Any, feed_forward: Any, norms: tuple[Any, Any]) -> None:
        self.attention, self.feed_forward = attention, feed_forward
        self.attention_norm, self.feed_forward_norm = norms

    def init_state(self, batch: int, capacity: int, dtype: Any) -> Any:
        """The mixer's state before the first token."""
        return self.attention.mixer.init_state(batch, capacity, dtype)

    def parallel(self, x: Array, context: Any, layout: Layout, state: Any) -> tuple[Array, Any]:
        """Whole rows `[B, T, E]`; the new state is None if `state` is."""
        attended, state = self.attend(x, context, layout, state)
        return self.finish(x, attended), state

    def attend(self, x: Array, context: Any, layout: Layout, state: Any = None) -> tuple[Array, Any]:
        """The output of attention for whole rows `[B, T, E]`, before it is added to them, and the new state."""
        qkv = self.attention.project(self.attention_norm(x), context)
        mixed, state = self.attention.mixer.parallel(qkv, layout, state)
        return self.attention.merge(mixed), state

    def verify(self, x: Array, context: Any, tree: TreeArrays, state: Any) -> tuple[Array, Any]:
        """Tree nodes `[B, N, E]` on top of a state."""
        qkv = self.attention.project(self.attention_norm(x), context)
        mixed, nodes = self.attention.mixer.verify(qkv, tree, state)
        return self.finish(x, self.attention.merge(mixed)), nodes

    def commit(self, state: Any, path: Any, length: Int[Array, " B"]) -> Any:
        """The state after the first `length` nodes of a path, row by row."""
        return self.attention.mixer.commit(state, path, length)

    def finish(self, x: Array, attended: Array) -> Array:
        """The layer's output `[B, T, E]`, from its input and the output of attention."""
        x = x + attended
        return x + self.feed_forward(self.feed_forward_norm(x))
