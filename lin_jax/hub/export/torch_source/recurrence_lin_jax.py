"""The recurrence that every attention here follows: a piece of a row, at most a group long, on top of a state.

Rows are padded on the right, and each row stands at a position of its own. Group g of a row is the tokens at positions
`g G` to `(g + 1) G - 1`. Query heads are split into K key/value heads times R queries that share one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

State = dict[str, Any]
"""Tensors whose first axis is the batch, or states of parts; empty before the first token."""

Bias = Callable[[Tensor], Tensor]
"""Relative biases `[B, K, R, N, S]` of distances `[B, N, S]`, how far a key is before a query."""


@dataclass(frozen=True)
class Rows:
    """Where the tokens of a batch stand.

    Attributes:
        position: `[B]` how many tokens each row has consumed before these.
        count: `[B]` how many of these are real, not padding.
        mixers: where each layer leaves a function of rows and its state that mixes these tokens again; None is nowhere.
    """

    position: Tensor
    count: Tensor
    mixers: list[Any] | None = None

    def piece(self, begin: int, size: int) -> "Rows":
        """The same for the tokens from `begin` to `begin + size`."""
        return Rows(self.position + self.count.clamp(max=begin), (self.count - begin).clamp(0, size))


@dataclass(frozen=True)
class Piece:
    """At most a group of tokens of each row, and behind which tokens of their first group they stand.

    Slot s of `group_keys` and `group_values` is position s of the group in which the piece begins, or of the next one;
    a piece finishes at most one group.

    Attributes:
        keys: `[B, N, K, D]` of the piece alone.
        values: `[B, N, K, E]` of the piece alone.
        rows: where the piece stands.
        size: tokens G in a group.
        group_keys: `[B, G + N, K, D]`.
        group_values: `[B, G + N, K, E]`.
        bias: of pairs by their distance; None is none.
    """

    keys: Tensor
    values: Tensor
    rows: Rows
    size: int
    group_keys: Tensor
    group_values: Tensor
    bias: Bias | None = None

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, rows: Rows, size: int, group: State, bias: Bias | None = None) -> "Piece":
        """A piece behind the unfinished group of a state."""
        filled = rows.position % size
        slots = (behind(group[name], filled, x) for name, x in (("keys", keys), ("values", values)))
        return cls(keys, values, rows, size, *slots, bias)

    @property
    def positions(self) -> Tensor:
        """`[B, N, 1]` of the piece's tokens."""
        return (self.rows.position[:, None] + torch.arange(self.keys.shape[1], device=self.keys.device))[..., None]

    @property
    def same_group(self) -> Tensor:
        """`[B, N, G + N]` whether a slot is in the group of a token of the piece, and not after it."""
        slots, own = self._slots
        return (slots <= own) & (slots // self.size == own // self.size)

    @property
    def earlier_group(self) -> Tensor:
        """`[B, N, G + N]` whether a slot is in the group before that of a token of the piece."""
        slots, own = self._slots
        return slots // self.size < own // self.size

    @property
    def distances(self) -> Tensor:
        """`[B, N, G + N]` how far a slot is before a token of the piece; negative behind it."""
        slots, own = self._slots
        return own - slots

    @property
    def group_bias(self) -> Tensor | None:
        """`[B, K, R, N, G + N]` bias between the piece's tokens and the slots, or None."""
        return None if self.bias is None else self.bias(self.distances)

    @property
    def finished(self) -> Tensor:
        """`[B]` whether the first group is full."""
        return self.rows.position % self.size + self.rows.count >= self.size

    @property
    def first_group(self) -> tuple[Tensor, Tensor]:
        """Keys `[B, G, K, D]` and values `[B, G, K, E]` of the first group, in float32 or better."""
        return wide(self.group_keys[:, : self.size]), wide(self.group_values[:, : self.size])

    @property
    def unfinished_group(self) -> State:
        """The group that is unfinished after the piece."""
        finished, after = self.finished[:, None, None, None], {}
        for name, slots in (("keys", self.group_keys), ("values", self.group_values)):
            next_group = nn.functional.pad(slots[:, self.size :], (0, 0, 0, 0, 0, 2 * self.size - slots.shape[1]))
            after[name] = torch.where(finished, next_group, slots[:, : self.size])
        return after

    @property
    def _slots(self) -> tuple[Tensor, Tensor]:
        first = (self.rows.position // self.size * self.size)[:, None, None]
        return torch.arange(self.group_keys.shape[1], device=self.keys.device), self.positions - first


def empty_group(keys: Tensor, values: Tensor, size: int) -> State:
    """The unfinished group before the first token."""
    return {name: x.new_zeros(x.shape[0], size, *x.shape[2:]) for name, x in (("keys", keys), ("values", values))}


def behind(old: Tensor, filled: Tensor, new: Tensor) -> Tensor:
    """The first `filled` slots of `old` and, behind them, `new`, row by row.

    Args:
        old: `[B, S, ...]`.
        filled: `[B]`, at most S.
        new: `[B, N, ...]`.

    Returns:
        `[B, S + N, ...]`; slots from `filled + N` on hold anything.
    """
    count = new.shape[1]
    slots = torch.arange(old.shape[1] + count, device=old.device)
    shape = (*filled.shape, slots.numel(), *(1,) * (new.dim() - 2))
    index = (slots - filled[:, None]).clamp(0, count - 1).reshape(shape)
    kept = (slots < filled[:, None]).reshape(shape)
    room = torch.cat([old, torch.zeros_like(new, dtype=old.dtype)], dim=1)
    return torch.where(kept, room, new.to(old.dtype).take_along_dim(index, dim=1))


def with_sinks(state: State, tokens: Mapping[str, Tensor], position: Tensor, sinks: int) -> dict[str, Tensor]:
    """Keys and values of a text's first tokens, that of position p in slot p, after some more of them.

    Args:
        state: what came before.
        tokens: keys `[B, N, K, D]` and values `[B, N, K, E]`.
        position: `[B]` tokens before these.
        sinks: slots S; if there are none, nothing is kept.
    """
    kept = {}
    for name, x in tokens.items() if sinks else ():
        place = torch.arange(sinks, device=position.device) - position[:, None]
        shape = (*place.shape, *(1,) * (x.dim() - 2))
        inside = ((place >= 0) & (place < x.shape[1])).reshape(shape)
        old = state.get(f"sink_{name}", x.new_zeros(x.shape[0], sinks, *x.shape[2:]))
        new = x.take_along_dim(place.clamp(0, x.shape[1] - 1).reshape(shape), dim=1)
        kept[f"sink_{name}"] = torch.where(inside, new.to(old.dtype), old)
    return kept


def wide(x: Tensor) -> Tensor:
    """The same in the type in which sums are kept: float32, or float64 for float64."""
    return x if x.dtype == torch.float64 else x.float()


def unit(vectors: Tensor) -> Tensor:
    """Vectors scaled to length one over the last axis; a zero vector stays zero and has a zero gradient."""
    square = vectors.square().sum(-1, keepdim=True)
    return vectors * torch.where(square > 0, torch.where(square > 0, square, 1).rsqrt(), 0)


def pair_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Inner products `[B, K, R, T, S]` of queries `[B, T, K, R, D]` and keys `[B, S, K, D]`."""
    return torch.einsum("btkrd,bskd->bkrts", queries, keys)


def weighted_values(weights: Tensor, values: Tensor) -> Tensor:
    """Sums `[B, T, K, R, E]` of values `[B, S, K, E]` under weights `[B, K, R, T, S]`."""
    return torch.einsum("bkrts,bske->btkre", weights, values)


def masked_weights(weights: Tensor, mask: Tensor) -> Tensor:
    """Weights `[B, K, R, T, S]` of the pairs that the mask `[B, T, S]` allows, zero elsewhere."""
    return weights.masked_fill(~mask[:, None, None], 0)


def softmax_weights(
    queries: Tensor, keys: Tensor, mask: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Softmax of `scale q·k + bias` over the pairs that the mask `[B, T, S]` allows; the scale is `D^-0.5` if None."""
    scores = pair_scores(queries, keys) * (queries.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    return scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
