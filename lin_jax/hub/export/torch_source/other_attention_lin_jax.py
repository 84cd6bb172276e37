"""What is no linear attention: over all pairs, softmax inside groups, linformer, and the scores of the local branch."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from .recurrence_lin_jax import (
    Piece,
    State,
    behind,
    masked_weights,
    pair_scores,
    softmax_weights,
    unit,
    weighted_values,
    wide,
    with_sinks,
)


def relu_squared(scores: Tensor) -> Tensor:
    """`relu(s)^2`."""
    return scores.relu().square()


def laplace(scores: Tensor) -> Tensor:
    """A normal distribution function of mean `1/2^0.5` and variance `1/4pi`."""
    deviation = math.sqrt(1 / (4 * math.pi))
    return (1 + torch.erf((scores - math.sqrt(0.5)) / (deviation * math.sqrt(2)))) / 2


def yoso_expectation(scores: Tensor) -> Tensor:
    """Expected collisions of 8-bit hashes, `(1 - arccos(0.98 s) / pi)^8`."""
    return (1 - torch.arccos(0.98 * scores.clamp(-1, 1)) / math.pi) ** 8


LOCAL_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "laplace": laplace,
    "relu_squared": relu_squared,
    "yoso": yoso_expectation,
}


def local_outputs(score: Callable[[Tensor], Tensor], queries: Tensor, piece: Piece) -> Tensor:
    """The local branch, `[B, N, K, R, E]`: a score function of unit queries and keys inside groups."""
    weights = score(pair_scores(unit(queries), unit(wide(piece.group_keys))))
    return weighted_values(masked_weights(weights, piece.same_group), wide(piece.group_values))


class GroupSoftmax(nn.Module):
    """Softmax inside groups (the diagonal layers of TransNormer); all that it keeps is the unfinished group."""

    def empty_state(self, keys: Tensor, values: Tensor) -> State:
        """Nothing beside the group."""
        return {}

    def forward(self, queries: Tensor, piece: Piece, state: State) -> tuple[Tensor, State]:
        """Outputs `[B, N, K, R, E]` of a piece, and the state after it."""
        weights = softmax_weights(queries, wide(piece.group_keys), piece.same_group)
        return weighted_values(weights, wide(piece.group_values)), state


class FullAttention(nn.Module):
    """Attention over all pairs; its state is the keys and values so far, and grows.

    Args:
        weights: `softmax` of `q·k / D^0.5`, or `square`: `relu(q·k)^2 / n` of unit vectors, over the n tokens seen.
    """

    def __init__(self, weights: Literal["softmax", "square"]) -> None:
        super().__init__()
        self.weights = weights

    def empty_state(self, keys: Tensor, values: Tensor) -> State:
        """No keys and no values."""
        return {"keys": keys[:, :0], "values": values[:, :0]}

    def forward(self, queries: Tensor, piece: Piece, state: State) -> tuple[Tensor, State]:
        """Outputs `[B, N, K, R, E]` of a piece over everything so far, and the state after it."""
        after = {
            "keys": behind(state["keys"], piece.rows.position, piece.keys),
            "values": behind(state["values"], piece.rows.position, piece.values),
        }
        keys, values = wide(after["keys"]), wide(after["values"])
        # Slots behind the last real token of all rows hold nothing.
        filled = int((piece.rows.position + piece.rows.count).max())
        after = {name: x[:, :filled] for name, x in after.items()}
        seen = torch.arange(keys.shape[1], device=keys.device) <= piece.positions
        if self.weights == "softmax":
            return weighted_values(softmax_weights(queries, keys, seen), values), after
        weights = masked_weights(relu_squared(pair_scores(unit(queries), unit(keys))), seen)
        return weighted_values(weights, values) / (piece.positions + 1)[..., None, None], after


class SlidingSoftmax(nn.Module):
    """Softmax of `q·k / D^0.5` over the last W tokens; its state is a ring of their keys and values, and does not grow.

    Args:
        window: tokens W that a query sees, itself among them.
        sinks: first tokens of a text that it sees besides.
    """

    def __init__(self, window: int, sinks: int = 0) -> None:
        super().__init__()
        self.window, self.sinks = window, sinks

    def empty_state(self, keys: Tensor, values: Tensor) -> State:
        """An empty ring, position p in slot `p % W`."""
        return {
            name: x.new_zeros(x.shape[0], self.window, *x.shape[2:]) for name, x in (("keys", keys), ("values", values))
        }

    def forward(self, queries: Tensor, piece: Piece, state: State) -> tuple[Tensor, State]:
        """Outputs `[B, N, K, R, E]` of a piece over the last tokens, and the state after it."""
        last = piece.rows.position[:, None] - 1
        held = last - (last - torch.arange(self.window, device=last.device)) % self.window
        known = torch.cat([held, piece.positions[..., 0].masked_fill(~self._real(piece), -1)], dim=1)[:, None]
        distance = piece.positions - known
        # A token sees itself, where it is padding too: a row of nothing would be no numbers.
        own = torch.arange(distance.shape[2], device=last.device) - self.window
        itself = own == torch.arange(distance.shape[1], device=last.device)[:, None]
        seen = (known >= self.sinks) & (distance >= 0) & (distance < self.window)
        keys, values = (torch.cat([state[name], getattr(piece, name)], dim=1) for name in ("keys", "values"))
        after = self._after(piece, {"keys": keys, "values": values})
        if not self.sinks:
            return weighted_values(softmax_weights(queries, wide(keys), seen | itself), wide(values)), after
        tokens = {"keys": piece.keys, "values": piece.values}
        sinks = with_sinks(state, tokens, piece.rows.position, self.sinks)
        keys, values = torch.cat([sinks["sink_keys"], keys], dim=1), torch.cat([sinks["sink_values"], values], dim=1)
        first = torch.arange(self.sinks, device=last.device) <= piece.positions
        seen = torch.cat([first.expand(*seen.shape[:2], -1), seen], dim=2)
        return weighted_values(softmax_weights(queries, wide(keys), seen), wide(values)), {**after, **sinks}

    def _after(self, piece: Piece, seen: State) -> State:
        """The ring after the real tokens of a piece: of every slot, its newest token."""
        last = (piece.rows.position + piece.rows.count)[:, None] - 1
        slots = torch.arange(self.window, device=last.device)
        place = last - (last - slots) % self.window - piece.rows.position[:, None]
        index = torch.where(place >= 0, self.window + place, slots)[..., None, None]
        return {name: x.take_along_dim(index, dim=1) for name, x in seen.items()}

    @staticmethod
    def _real(piece: Piece) -> Tensor:
        order = torch.arange(piece.keys.shape[1], device=piece.keys.device)
        return order < piece.rows.count[:, None]


class Linformer(nn.Module):
    """Softmax over the own group's tokens and r summaries of each finished group.

    The state is the summaries, `2 r K D` numbers a group, and grows.

    Args:
        group_size: tokens in a group.
        rank: summaries r of a group.
    """

    def __init__(self, group_size: int, rank: int) -> None:
        super().__init__()
        self.key_projection = nn.Parameter(torch.zeros(group_size, rank))
        self.value_projection = nn.Parameter(torch.zeros(group_size, rank))

    def initial_values(self) -> dict[str, Tensor]:
        """Means over r equal parts of a group."""
        size, rank = self.key_projection.shape
        parts = nn.functional.one_hot(torch.arange(size) * rank // size, rank).float()
        return dict.fromkeys(("key_projection", "value_projection"), parts / parts.sum(0))

    def empty_state(self, keys: Tensor, values: Tensor) -> State:
        """No summaries."""
        rank = self.key_projection.shape[1]
        return {
            name: wide(x.new_zeros(x.shape[0], 0, rank, *x.shape[2:]))
            for name, x in (("keys", keys), ("values", values))
        }

    def forward(self, queries: Tensor, piece: Piece, state: State) -> tuple[Tensor, State]:
        """Outputs `[B, N, K, R, E]` of a piece, and the state after it.

        The group that the piece may finish is summarised, for the tokens of the piece that stand behind it.
        """
        groups = piece.rows.position // piece.size
        projections = ("keys", self.key_projection), ("values", self.value_projection)
        summaries = {
            name: behind(state[name], groups, torch.einsum("sr,bskd->brkd", projection.to(x.dtype), x)[:, None])
            for (name, projection), x in zip(projections, piece.first_group, strict=True)
        }
        known = torch.arange(summaries["keys"].shape[1], device=groups.device) < piece.positions // piece.size
        known = known.repeat_interleave(self.key_projection.shape[1], dim=2)

        keys = torch.cat([wide(piece.group_keys), summaries["keys"].flatten(1, 2)], dim=1)
        values = torch.cat([wide(piece.group_values), summaries["values"].flatten(1, 2)], dim=1)
        outputs = weighted_values(softmax_weights(queries, keys, torch.cat([piece.same_group, known], dim=2)), values)
        count = int((groups + piece.finished).max())
        return outputs, {name: x[:, :count] for name, x in summaries.items()}
