"""What a batch of texts leaves behind: the states of all layers, for `generate` and for texts fed in parts."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .recurrence_lin_jax import State


class LinJaxCache:
    """States of all layers. Their size is constant, but for attentions that keep all tokens, or summaries of them.

    Args:
        layers: number of layers.

    Attributes:
        states: of every layer, as `mix_tokens` returns them.
        position: `[B]` real tokens that each row has consumed; None before the first.
        length: tokens fed so far, padding included: where `generate` stands in its rows.
    """

    is_compileable = False
    is_linear = (False,)  # of a linear state, `generate` would not take away the tokens that it has consumed

    def __init__(self, layers: int) -> None:
        self.states: list[State] = [{} for _ in range(layers)]
        self.position: Tensor | None = None
        self.length = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens fed so far, padding included."""
        return self.length

    def advance(self, count: Tensor, length: int) -> None:
        """Notes that `count` `[B]` real tokens were consumed, of rows of `length`."""
        self.position = count if self.position is None else self.position + count
        self.length += length

    def crop(self, *lengths: int) -> None:
        """Refuses to forget the last tokens, as assisted generation asks of an assistant.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "a linearized model cannot be an assistant: its state does not go back to fewer tokens"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keeps the rows that a beam search goes on with, in this order."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some of the rows."""
        self._map(lambda x: x[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    @property
    def nbytes(self) -> int:
        """Size of all states in bytes."""
        sizes: list[int] = []
        _map_tensors(self.states, lambda x: sizes.append(x.nbytes))
        return sum(sizes)

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        self.states = _map_tensors(self.states, function)
        self.position = _map_tensors(self.position, function)


def state_among(arguments: Iterable[Any]) -> LinJaxCache | None:
    """The state among arguments, whatever name it has in a version of transformers; there may be others beside it.

    Raises:
        ValueError: there are two.
    """
    # By name: each exported folder brings a copy of the class.
    states = [value for value in arguments if type(value).__name__ == LinJaxCache.__name__]
    if any(state is not states[0] for state in states):
        raise ValueError("two states were given; give one, as cache or as past_key_values")
    return states[0] if states else None


def given_state(named: Iterable[Any], others: Iterable[Any]) -> LinJaxCache | None:
    """The state among the arguments of `forward`.

    Args:
        named: those that are for a state.
        others: those of unknown names.

    Raises:
        TypeError: something else was given as a state.
        ValueError: there are two.
    """
    named = [value for value in named if value is not None]
    state = state_among([*named, *others])
    if named and state is None:
        raise TypeError(f"the state is a {type(named[0]).__name__}; give the one that an earlier call returned")
    return state


def _map_tensors(tree: Any, function: Callable[[Tensor], Any]) -> Any:
    if isinstance(tree, dict):
        return {name: _map_tensors(part, function) for name, part in tree.items()}
    if isinstance(tree, list):
        return [_map_tensors(part, function) for part in tree]
    return function(tree) if isinstance(tree, torch.Tensor) else tree
