"""The contract that every token mixer keeps: three forms that agree, and a state between them.

*parallel* takes a whole sequence at once, optionally from a state; *verify* scores the nodes of a draft tree against
a state without touching it; *commit* folds an accepted path into the state. Plain decoding is verify and commit with
one node.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, Int

from lin_jax.attention.layout import Layout
from lin_jax.attention.tree import TreeArrays
from lin_jax.errors import UserError

State = Any


class Nodes(NamedTuple):
    """Keys and values of a draft tree's nodes (or of a path through it), as a mixer wants to store them."""

    keys: Float[Array, "*layers B N K D"]
    values: Float[Array, "*layers B N K E"]

    def along(self, path: Int[Array, "B P"]) -> "Nodes":
        """The nodes at `path`, row by row."""
        index = path[:, :, None, None]
        return Nodes(*(jax.numpy.take_along_axis(part, index, axis=1) for part in self))


@runtime_checkable
class TokenMixer(Protocol):
    """What mixes tokens. Queries are `[B, T, H, D]`, keys and values `[B, T, K, D]`, with H a multiple of K."""

    def init_state(self, batch: int, capacity: int, dtype: Any) -> State:
        """The state of `batch` sequences before their first token; `capacity` bounds the tokens a cache must hold."""

    def parallel(
        self, queries: Array, keys: Array, values: Array, layout: Layout, state: State | None = None
    ) -> tuple[Array, State | None]:
        """Outputs `[B, T, H, D]` of a whole sequence and, if a state was given, the state after it."""

    def verify(self, queries: Array, keys: Array, values: Array, tree: TreeArrays, state: State) -> tuple[Array, Nodes]:
        """Outputs `[B, N, H, D]` of the nodes of a tree that stands on the state, and what commit needs of them."""

    def commit(self, state: State, path: Nodes, length: Int[Array, " B"]) -> State:
        """The state after the first `length` nodes of `path`, row by row; zero leaves a row as it is."""


@dataclass(frozen=True)
class AttentionConfig:
    """Which token mixer, and its sizes.

    Attributes:
        name: an entry of the registry: augmented, local, grouped, local_grouped, local_convolution,
            grouped_convolution, softmax.
        group_size: tokens in a group, by absolute position.
        kernel_size: odd size of the centred convolution kernel whose future half is masked away.
        local_score: score function of the local branch: relu_squared or yoso.
        initial_alpha: where the learnt factor of the grouped branch starts.
    """

    name: str = "augmented"
    group_size: int = 64
    kernel_size: int = 63
    local_score: str = "relu_squared"
    initial_alpha: float = 0.0

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise UserError(f"attention.group_size is {self.group_size}; give a positive number of tokens")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise UserError(
                f"attention.kernel_size is {self.kernel_size}; give an odd number, so that the kernel has a centre"
            )
