"""What is no linear attention: over all pairs, softmax inside groups, linformer, and the scores of the local branch."""

import math
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class LocalBranch:
    """The local branch: a score function of queries and keys inside groups.

    Attributes:
        score: turns q·k into a weight.
        unit: scale queries and keys to length one first.
        scale: factor of q·k.
        size: read only the first so many features of queries and keys; None reads all.
        bias_on_scores: whether a relative bias joins the scores; else the weights.
    """

    score: Callable[[Tensor], Tensor]
    unit: bool = True
    scale: float = 1.0
    size: int | None = None
    bias_on_scores: bool = False

    def weights(self, queries: Tensor, keys: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
        """Weights `[B, K, R, T, S]` of the pairs that the mask `[B, T, S]` allows, zero elsewhere."""
        queries, keys = queries[..., : self.size], keys[..., : self.size]
        scores = pair_scores(*((unit(queries), unit(keys)) if self.unit else (queries, keys))) * self.scale
        if bias is None:
            weights = self.score(scores)
        elif self.bias_on_scores:
            weights = self.score(scores + bias.to(scores.dtype))
        else:
            weights = self.score(scores) + bias.to(scores.dtype)
        return masked_weights(weights, mask)

    def outputs(self, queries: Tensor, piece: Piece) -> Tensor:
        """Outputs `[B, N, K, R, E]` of a piece."""
        weights = self.weights(queries, wide(piece.group_keys), piece.same_group, piece.group_bias)
        return weighted_values(weights, wide(piece.group_values))


class GroupSoftmax(nn.Module):
    """Softmax inside groups (the diagonal layers of TransNormer); all that it keeps is the unfinished group."""

    def empty_state(self, keys: Tensor, values: Tensor) -> State:
        """Nothing beside the group."""
        return {}

    def forward(self, queries: Tensor, piece: Piece, state: State) -> tuple[Tensor, State]:
        """Outputs `[B, N, K, R, E]` of a piece, and the state after it."""
        weights = softmax_weights(queries, wide(piece.group_keys), piece.same_group, piece.group_bias)
        return weighted_values(weights, wide(piece.group_values)), state


class FullAttention(nn.Module):
    """Attention over all pairs; its state is the keys and values so far, and grows.

    Args:
        weights: `softmax` of `c q·k`, or `square`: `relu(q·k)^2 / n` of unit vectors, over the n tokens seen.
        scale: c; None is `D^-0.5`.
        by_length: whether scores are divided by n, as FLASH has it: `softmax` of `q·k / n`, `relu(q·k / n)^2 / n^2`.
    """

    def __init__(
        self, weights: Literal["softmax", "square"], scale: float | None = None, *, by_length: bool = False
    ) -> None:
        super().__init__()
        self.weights, self.by_length = weights, by_length
        self.scale = 1.0 if by_length else scale

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
        distances = piece.positions - torch.arange(keys.shape[1], device=keys.device)
        bias = None if piece.bias is None else piece.bias(distances)
        return self.outputs((queries, keys, values), distances >= 0, piece.positions + 1, bias), after

    def outputs(
        self, inputs: tuple[Tensor, Tensor, Tensor], seen: Tensor, count: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """Outputs `[B, T, K, R, E]` over the pairs that a mask allows.

        Args:
            inputs: queries `[B, T, K, R, D]`, keys `[B, S, K, D]` and values `[B, S, K, E]`, in float32 or better.
            seen: `[B, T, S]` the mask.
            count: `[B, T, 1]` tokens n that each query sees.
            bias: `[B, K, R, T, S]`, or None.
        """
        queries, keys, values = inputs
        count = count[..., None, None].to(queries.dtype)
        if self.weights == "softmax":
            queries = queries / count if self.by_length else queries
            return weighted_values(softmax_weights(queries, keys, seen, bias, self.scale), values)
        scores = pair_scores(queries / count, keys) if self.by_length else pair_scores(unit(queries), unit(keys))
        scores = scores if bias is None else scores + bias.to(scores.dtype)
        outputs = weighted_values(masked_weights(relu_squared(scores), seen), values)
        return outputs / (count.square() if self.by_length else count)


class SlidingSoftmax(nn.Module):
    """Softmax of `c q·k` over the last W tokens; its state is a ring of their keys and values, and does not grow.

    Args:
        window: tokens W that a query sees, itself among them.
        scale: c; None is `D^-0.5`.
        sinks: first tokens of a text that it sees besides.
    """

    def __init__(self, window: int, scale: float | None = None, sinks: int = 0) -> None:
        super().__init__()
        self.window, self.scale, self.sinks = window, scale, sinks

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
        seen = (known >= self.sinks) & (distance >= 0) & (distance < self.window)
        keys, values = (torch.cat([state[name], getattr(piece, name)], dim=1) for name in ("keys", "values"))
        after = self._after(piece, {"keys": keys, "values": values})
        sinks = with_sinks(state, {"keys": piece.keys, "values": piece.values}, piece.rows.position, self.sinks)
        if sinks:
            keys = torch.cat([sinks["sink_keys"], keys], dim=1)
            values = torch.cat([sinks["sink_values"], values], dim=1)
            before = piece.positions - torch.arange(self.sinks, device=last.device)
            distance = torch.cat([before.expand(*seen.shape[:2], -1), distance], dim=2)
            seen = torch.cat([(before >= 0).expand(*seen.shape[:2], -1), seen], dim=2)
        else:
            # A token sees itself, where it is padding too: a row of nothing would be no numbers.
            own = torch.arange(distance.shape[2], device=last.device) - self.window
            seen = seen | (own == torch.arange(distance.shape[1], device=last.device)[:, None])
        bias = None if piece.bias is None else piece.bias(distance)
        outputs = weighted_values(softmax_weights(queries, wide(keys), seen, bias, self.scale), wide(values))
        return outputs, {**after, **sinks}

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
