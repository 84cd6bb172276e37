"""The contract that every token mixer keeps: forms that agree with each other.

A causal mixer has three: *parallel* takes a whole sequence at once, optionally from a state; *verify* scores the nodes
of a draft tree against a state without touching it; *commit* folds an accepted path into the state. Plain decoding is
verify and commit with one node. A bidirectional mixer has one form, for encoders. A cross mixer has two: *condense*
turns what an encoder wrote into a memory, *read* answers any number of queries from it, alone or in a tree.

Queries are `[B, T, H, D]`, keys `[B, T, K, D]`, values `[B, T, K, E]`, with H a multiple of K.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, Int

from lin_jax.attention.bias import RelativeBias
from lin_jax.attention.layout import Layout
from lin_jax.attention.tree import TreeArrays
from lin_jax.errors import UserError
from pallas_kernels.augmented_attention.operation import IMPLEMENTATIONS

State = Any
Form = Literal["causal", "bidirectional", "cross"]


class Nodes(NamedTuple):
    """Keys and values of a draft tree's nodes (or of a path through it), as a mixer wants to store them."""

    keys: Float[Array, "*layers B N K D"]
    values: Float[Array, "*layers B N K E"]


def along(nodes: Any, path: Int[Array, "B P"]) -> Any:
    """What a tree of arrays `[B, N, ...]` holds of the nodes at `path`, row by row."""

    def take(part: Array) -> Array:
        return jax.numpy.take_along_axis(part, path.reshape(*path.shape, *(1,) * (part.ndim - 2)), axis=1)

    return jax.tree.map(take, nodes)


@runtime_checkable
class TokenMixer(Protocol):
    """What mixes tokens causally."""

    def init_state(self, batch: int, capacity: int, dtype: Any) -> State:
        """The state of `batch` sequences before their first token; `capacity` bounds the tokens a cache must hold."""

    def parallel(
        self,
        queries: Array,
        keys: Array,
        values: Array,
        layout: Layout,
        state: State | None = None,
        bias: RelativeBias | None = None,
    ) -> tuple[Array, State | None]:
        """Outputs `[B, T, H, E]` of a whole sequence and, if a state was given, the state after it."""

    def verify(
        self,
        queries: Array,
        keys: Array,
        values: Array,
        tree: TreeArrays,
        state: State,
        bias: RelativeBias | None = None,
    ) -> tuple[Array, Any]:
        """Outputs `[B, N, H, E]` of the nodes of a tree that stands on the state, and what commit needs of them."""

    def commit(self, state: State, path: Any, length: Int[Array, " B"]) -> State:
        """The state after the first `length` nodes of `path`, row by row; zero leaves a row as it is."""


@runtime_checkable
class BidirectionalMixer(Protocol):
    """What mixes the tokens of an encoder."""

    def bidirectional(
        self, queries: Array, keys: Array, values: Array, layout: Layout, bias: RelativeBias | None = None
    ) -> Array:
        """Outputs `[B, T, H, E]`; no output of a present token depends on one that is not present."""


@runtime_checkable
class CrossMixer(Protocol):
    """What lets a decoder read an encoder's output."""

    def condense(self, keys: Array, values: Array, layout: Layout) -> Any:
        """What queries need to know of an encoder's keys `[B, S, K, D]` and values `[B, S, K, E]`."""

    def read(self, queries: Array, positions: Int[Array, "B T"], memory: Any) -> Array:
        """Outputs `[B, T, H, E]` of queries at the given positions of the decoder."""


@dataclass(frozen=True)
class Conventions:
    """How a model prepares what its mixers multiply: what differs between published models, and no user chooses.

    Attributes:
        unit: scale queries and keys of the local and grouped branches (and of `square`) to length one.
        unit_values: the same for the values of both branches, not of the convolution (T5).
        separate: queries and keys hold those of the local and of the grouped branch side by side (FLASH).
        inverse_group: divide local scores and the grouped branch by the group size (FLASH); where the branch is
            bidirectional, divide it by `length` instead.
        bias: where the local branch adds a relative bias: to the scores, or to the weights after the score function.
        merged_norm: divide all heads' outputs together by `1e-4` plus their length, before the convolution (T5).
        softmax_scale: what softmax scores are multiplied with: `D^-1/2`, one, or the inverse length (FLASH).
        length: the length that `square`, a softmax scaled by it and FLASH's bidirectional branch divide by: the tokens
            that the query sees, or the row's, padding included, as published for FLASH, which cannot decode.
        centred: whether a bidirectional convolution sees both sides, or the past only (FLASH).
        factor: whether the grouped branch beside a local one has a learnt factor alpha (not in FLASH).
    """

    unit: bool = True
    unit_values: bool = False
    separate: bool = False
    inverse_group: bool = False
    bias: Literal["scores", "weights"] = "weights"
    merged_norm: bool = False
    softmax_scale: Literal["root", "one", "length"] = "root"
    length: Literal["position", "row"] = "position"
    centred: bool = True
    factor: bool = True


@dataclass(frozen=True)
class AttentionConfig:
    """Which token mixer, and its sizes.

    Attributes:
        name: an attention of the registry, with `+local` and `+convolution` behind it for the augmentation, such as
            `performer+local+convolution`; `augmented` is short for `flash_global+local+convolution`.
        group_size: tokens in a group, by absolute position.
        kernel_size: odd size of the centred convolution kernel whose future half is masked away in causal models.
        local_score: score function of the local branch: relu_squared, laplace or yoso.
        initial_alpha: where the learnt factor of the branch beside a local one starts.
        features: random features of performer and rfa; None takes twice the head's size.
        rank: summaries of each group in linformer.
        hashes: hash tables of yoso.
        hash_bits: bits of each hash of yoso; a table has `2^hash_bits` rows.
        diagonal_layers: first layers that transnormer gives softmax attention inside groups.
        convolve_padding: let the convolution of an encoder read padding, as the published T5 does.
        implementation: what computes the local and grouped branches and the convolution together: xla, tpu, gpu, or the
            last two interpreted; None takes what suits the platform. Softmax over whole rows goes through cuDNN on a
            GPU unless this is xla.
    """

    name: str = "augmented"
    group_size: int = 64
    kernel_size: int = 63
    local_score: str = "relu_squared"
    initial_alpha: float = 0.0
    features: int | None = None
    rank: int = 4
    hashes: int = 16
    hash_bits: int = 6
    diagonal_layers: int = 1
    convolve_padding: bool = False
    implementation: str | None = None

    def __post_init__(self) -> None:
        for name in ("group_size", "rank", "hashes", "hash_bits"):
            if getattr(self, name) < 1:
                raise UserError(f"attention.{name} is {getattr(self, name)}; give a positive number")
        if self.features is not None and self.features < 2:
            raise UserError(f"attention.features is {self.features}; give at least 2")
        if self.implementation not in (None, *IMPLEMENTATIONS):
            raise UserError(
                f"attention.implementation is '{self.implementation}'; choose one of {', '.join(IMPLEMENTATIONS)}"
            )
        if self.diagonal_layers < 0:
            raise UserError(f"attention.diagonal_layers is {self.diagonal_layers}; give zero or more")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise UserError(
                f"attention.kernel_size is {self.kernel_size}; give an odd number, so that the kernel has a centre"
            )
