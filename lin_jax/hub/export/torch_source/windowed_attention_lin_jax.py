"""Attention over a window of tokens and a memory of all before them, which may decay.

Under one normaliser, `(sum_near e^{c q·k} v + e^b sum_far phi(q)·phi(k) d v) / (the same of ones)`, or apart, a local
branch beside a linear attention. A state is the memory, decayed up to its last token, and the tokens behind it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .linear_attention_lin_jax import LinearAttention
from .other_attention_lin_jax import LocalBranch
from .recurrence_lin_jax import (
    Bias,
    Rows,
    State,
    behind,
    masked_weights,
    pair_scores,
    weighted_values,
    wide,
    with_sinks,
)

Turn = Callable[[Tensor, Tensor], Tensor]
"""Rotary positions: vectors `[B, T, ..., D]` and positions `[B, T]` to vectors that are turned."""


@dataclass(frozen=True)
class Window:
    """The tokens just before a query, by position in its row.

    Attributes:
        tokens: of a sliding window, the query's own included; None is a window of groups, zero is no window.
        group_size: tokens of a group.
        groups: finished groups before the query's own.
        sinks: first tokens of a text that stay near for ever, and are never in the memory.
    """

    tokens: int | None
    group_size: int
    groups: int
    sinks: int = 0

    @classmethod
    def of(cls, sizes: Mapping[str, Any], *, windowed: bool, grouped: bool) -> "Window":
        """Reads a configuration: its window, or its groups alone, or neither."""
        if windowed:
            groups = sizes.get("window_groups", 1)
            return cls(sizes.get("window"), sizes["group_size"], groups, sizes.get("sinks", 0))
        return cls(None if grouped else 0, sizes["group_size"], 0)

    @property
    def capacity(self) -> int:
        """The most tokens that the next query's window may hold before it."""
        return (self.groups + 1) * self.group_size if self.tokens is None else max(self.tokens - 1, 0)

    @property
    def piece(self) -> int:
        """Tokens of the pieces that rows are cut into."""
        return self.group_size if self.tokens is None else max(self.capacity, 32)

    def start(self, positions: Tensor) -> Tensor:
        """Positions at which the windows of queries begin, negative ones included."""
        if self.tokens is None:
            return (positions // self.group_size - self.groups) * self.group_size
        return positions - self.tokens + 1

    def first(self, position: Tensor) -> Tensor:
        """Positions of the first token that is not in the memory, when so many tokens were consumed."""
        return torch.minimum(self.start(position).clamp(min=0), position)


@dataclass(frozen=True)
class Slots:
    """A piece of rows behind the tokens of a state, slot s of which is position `first + s`.

    Attributes:
        first: `[B]`.
        positions: `[B, N]` of the piece's tokens.
        keys: `[B, C + N, K, D]`; slots behind the piece hold anything.
        values: `[B, C + N, K, E]`.
        decays: `[B, C + N, K]` sums of the logarithms of decay up to each slot; None without decay.
        near: `[B, N, C + N]` whether a slot is in a token's window.
        far: `[B, N, C + N]` whether it is before it. Sinks are neither: they have slots of their own.
    """

    first: Tensor
    positions: Tensor
    keys: Tensor
    values: Tensor
    decays: Tensor | None
    near: Tensor
    far: Tensor

    @classmethod
    def of(cls, window: Window, tokens: Mapping[str, Tensor], rows: Rows, state: State) -> "Slots":
        """A piece, its keys, values and logarithms of decay, behind a state."""
        first = window.first(rows.position)
        slots = {name: behind(state[name], rows.position - first, x) for name, x in tokens.items()}
        count, device = tokens["keys"].shape[1], first.device
        positions = rows.position[:, None] + torch.arange(count, device=device)
        keys = (first[:, None] + torch.arange(slots["keys"].shape[1], device=device))[:, None]
        causal, near = keys <= positions[..., None], keys >= window.start(positions)[..., None]
        causal = causal & (keys >= window.sinks)
        decays = slots["decays"].cumsum(1) if "decays" in slots else None
        return cls(first, positions, slots["keys"], slots["values"], decays, causal & near, causal & ~near)

    @property
    def slot_positions(self) -> Tensor:
        """`[B, C + N]` positions of the slots."""
        return self.first[:, None] + torch.arange(self.keys.shape[1], device=self.first.device)

    @property
    def distances(self) -> Tensor:
        """`[B, N, C + N]` how far a slot is before a token of the piece; negative behind it."""
        return self.positions[..., None] - self.slot_positions[:, None]

    def sink_distances(self, sinks: int) -> Tensor:
        """`[B, N, sinks]` how far the first tokens of a text are before a token of the piece; negative behind it."""
        return self.positions[..., None] - torch.arange(sinks, device=self.first.device)

    @property
    def elapsed(self) -> Tensor | None:
        """`[B, N, K]` sums of the logarithms of decay from the memory's last token to the piece's."""
        if self.decays is None:
            return None
        return self.decays.take_along_dim((self.positions - self.first[:, None])[..., None], dim=1)

    def factors(self, mask: Tensor) -> Tensor | None:
        """Decay `[B, K, 1, N, C + N]` between a slot and a token of the piece, where the mask has a pair."""
        if self.decays is None:
            return None
        between = self.elapsed.transpose(1, 2)[..., None] - self.decays.transpose(1, 2)[:, :, None]
        return between.masked_fill(~mask[:, None], 0).exp()[:, :, None]


class WindowedMemory(nn.Module):
    """A window before the memory of a linear attention.

    Args:
        window: the tokens that are near.
        heads: query heads H.
        kv_heads: key/value heads K.
        value_dim: size E of values.
        softmax: whether near pairs share a normaliser with the memory; else they have a branch of their own, or none.
        decay: of the memory: none, constant or token.
        scale: factor of q·k in softmax; None is `D^-0.5`.
    """

    def __init__(
        self,
        window: Window,
        heads: int,
        kv_heads: int,
        value_dim: int,
        *,
        softmax: bool,
        decay: str,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.window, self.scale = window, scale
        self.balance = nn.Parameter(torch.zeros(kv_heads, heads // kv_heads)) if softmax else None
        self.decay: ConstantDecay | TokenDecay | None = None
        if decay != "none":
            self.decay = ConstantDecay(kv_heads) if decay == "constant" else TokenDecay(kv_heads, value_dim)

    def initial_values(self) -> dict[str, Tensor]:
        """Zero: the memory weighs what its features say."""
        return {} if self.balance is None else {"balance": torch.zeros(self.balance.shape)}

    def empty_state(self, linear: LinearAttention, keys: Tensor, values: Tensor) -> State:
        """Before the first token, for keys and values of these shapes and types."""
        size = self.window.capacity
        state = {name: x.new_zeros(x.shape[0], size, *x.shape[2:]) for name, x in (("keys", keys), ("values", values))}
        if self.decay is not None:
            state["decays"] = wide(values.new_zeros(values.shape[0], size, values.shape[2]))
        return {**state, **linear.empty_state(keys, values)}

    def forward(
        self,
        linear: LinearAttention,
        inputs: tuple[Tensor, Tensor, Tensor],
        rows: Rows,
        state: State,
        *,
        local: LocalBranch | None = None,
        factor: Tensor | None = None,
        bias: Bias | None = None,
        turn: Turn | None = None,
    ) -> tuple[Tensor, State]:
        """Outputs `[B, T, K, R, E]` of whole rows, a piece at a time, and the state after them.

        Args:
            linear: whose memory it is.
            inputs: queries `[B, T, K, R, D]` in float32 or better, keys `[B, T, K, D]`, values `[B, T, K, E]`.
            rows: where the tokens stand.
            state: what came before; empty is nothing.
            local: a branch of the near pairs' own.
            factor: of the memory beside that branch.
            bias: of near pairs by their distance; None is none.
            turn: rotary positions, for near pairs alone; None where queries and keys come turned, or have none.
        """
        queries, keys, values = inputs
        state, size, outputs = state or self.empty_state(linear, keys, values), self.window.piece, []
        tokens = {"keys": keys, "values": values}
        if self.decay is not None:
            tokens["decays"] = self.decay(wide(values))
        for begin in range(0, keys.shape[1], size):
            part = {name: x[:, begin : begin + size] for name, x in tokens.items()}
            asking, piece = queries[:, begin : begin + size], rows.piece(begin, size)
            slots = Slots.of(self.window, part, piece, state)
            first = {name: part[name] for name in ("keys", "values")}
            sinks = with_sinks(state, first, piece.position, self.window.sinks)
            distances = torch.cat([slots.sink_distances(self.window.sinks), slots.distances], dim=2)
            between = None if bias is None else bias(distances)
            outputs.append(self._outputs(linear, asking, slots, sinks, state["memory"], local, factor, between, turn))
            state = {**self._after(linear, slots, part, piece, state), **sinks}
        return torch.cat(outputs, dim=1), state

    def _outputs(
        self,
        linear: LinearAttention,
        queries: Tensor,
        slots: Slots,
        sinks: State,
        memory: Tensor,
        local: LocalBranch | None,
        factor: Tensor | None,
        bias: Tensor | None,
        turn: Turn | None,
    ) -> Tensor:
        """Outputs `[B, N, K, R, E]` of a piece."""
        far = torch.einsum("btkrm,bkme->btkre", linear.query_features(queries), memory)
        if slots.elapsed is not None:
            far = far * slots.elapsed.exp()[..., None, None]
        # A linear attention that reaches all keys counts those of a local branch twice.
        mask = slots.near | slots.far if local is not None and linear.own_group else slots.far
        if mask.any():
            weights = pair_scores(linear.query_features(queries), linear.key_features(wide(slots.keys)))
            weights = masked_weights(weights, mask)
            weights = weights if slots.decays is None else weights * slots.factors(mask)
            far = far + weighted_values(weights, linear.extended(wide(slots.values)))
        if self.balance is not None:
            keys, values, near = wide(slots.keys), wide(slots.values), slots.near
            scored, places = None, slots.slot_positions
            if sinks:
                keys = torch.cat([wide(sinks["sink_keys"]), keys], dim=1)
                values = torch.cat([wide(sinks["sink_values"]), values], dim=1)
                near = torch.cat([slots.sink_distances(self.window.sinks) >= 0, near], dim=2)
                first = torch.arange(self.window.sinks, device=places.device).expand(places.shape[0], -1)
                places = torch.cat([first, places], dim=1)
            if turn is not None:
                scored, keys = turn(queries, slots.positions), turn(keys, places)
            return self.normalised(linear, queries, keys, values, near, far, bias, scored)
        outputs = linear.finish(far)
        if local is None:
            return outputs
        near = weighted_values(local.weights(queries, wide(slots.keys), slots.near, bias), wide(slots.values))
        return near + (outputs if factor is None else factor.to(outputs.dtype) * outputs)

    def normalised(
        self,
        linear: LinearAttention,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        near: Tensor,
        far: Tensor,
        bias: Tensor | None = None,
        scored: Tensor | None = None,
    ) -> Tensor:
        """Softmax of near pairs and the memory's sums `[B, N, K, R, E + 1]`, under one normaliser.

        Args:
            linear: whose memory it is.
            queries: `[B, N, K, R, D]`, all of them in float32 or better.
            keys: `[B, S, K, D]`.
            values: `[B, S, K, E]`.
            near: `[B, N, S]` the pairs.
            far: the sums.
            bias: `[B, K, R, N, S]` of the near pairs' scores, or None.
            scored: queries as near pairs are scored; None is as the memory reads them.
        """
        scores = pair_scores(queries if scored is None else scored, keys) * (
            queries.shape[-1] ** -0.5 if self.scale is None else self.scale
        )
        scores = scores if bias is None else scores + bias.to(scores.dtype)
        scores = scores.masked_fill(~near[:, None, None], -torch.inf)
        scale = linear.log_scale(queries) + self.balance.to(scores.dtype)
        total = far[..., -1]
        seen = scale + torch.where(total > 0, total, 1).log()
        largest = torch.maximum(scores.amax(-1).movedim(-1, 1), torch.where(total > 0, seen, -torch.inf)).detach()
        weights = (scores - largest.movedim(1, -1)[..., None]).exp()
        close = weighted_values(weights, linear.extended(values))
        factor = torch.where(total > 0, scale - largest, 0).exp()
        return linear.finish(close + factor[..., None] * far)

    def _after(
        self, linear: LinearAttention, slots: Slots, tokens: Mapping[str, Tensor], rows: Rows, state: State
    ) -> State:
        """The state after a piece: what has left the window of the next query is in the memory."""
        left = self.window.first(rows.position + rows.count) - slots.first
        most, memory, kept = int(left.max()), state["memory"], {}
        if most:
            order = torch.arange(most, device=left.device)
            leaving = (order < left[:, None]) & (slots.first[:, None] + order >= self.window.sinks)
            leaving = leaving[..., None]
            factors = leaving.to(memory.dtype)
            if slots.decays is not None:
                last = slots.decays.take_along_dim((left - 1).clamp(min=0)[:, None, None], dim=1)
                factors = (last - slots.decays[:, :most]).masked_fill(~leaving, -torch.inf).exp()
                across = torch.where(left[:, None] > 0, last[:, 0].exp(), 1)
                memory = memory * across[..., None, None]
            keys, values = (wide(x[:, :most]) for x in (slots.keys, slots.values))
            values = linear.extended(values) * factors[..., None]
            memory = memory + torch.einsum("bskm,bske->bkme", linear.key_features(keys), values)
        index = left[:, None] + torch.arange(self.window.capacity, device=left.device)
        filled = rows.position - slots.first
        for name, x in tokens.items():
            old = behind(state[name], filled, x)
            place = index.clamp(max=old.shape[1] - 1).reshape(*index.shape, *(1,) * (old.dim() - 2))
            kept[name] = old.take_along_dim(place, dim=1)
        return {**kept, "memory": memory}


class ConstantDecay(nn.Module):
    """A factor for each head, `log a = -exp(rate)`.

    Args:
        kv_heads: key/value heads K.
    """

    def __init__(self, kv_heads: int) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.zeros(kv_heads))

    def initial_values(self) -> dict[str, Tensor]:
        """Half-lives from 16 to 2,048 tokens."""
        count = self.rate.shape[0]
        powers = torch.linspace(4, 11, count) if count > 1 else torch.full((1,), 8.0)
        return {"rate": (torch.log(torch.tensor(2.0)) / 2**powers).log()}

    def forward(self, values: Tensor) -> Tensor:
        """`log a` `[B, T, K]` of every token, from its value."""
        return (-self.rate.to(values.dtype).exp()).expand(values.shape[:-1])


class TokenDecay(nn.Module):
    """A factor that each token chooses, `log a = log(sigmoid(w·v + b)) / 16`.

    Args:
        kv_heads: key/value heads K.
        value_dim: size E of values.
    """

    def __init__(self, kv_heads: int, value_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(kv_heads, value_dim))
        self.bias = nn.Parameter(torch.zeros(kv_heads))

    def initial_values(self) -> dict[str, Tensor]:
        """Half-lives of about 256 tokens."""
        return {"weight": torch.zeros(self.weight.shape), "bias": torch.full(self.bias.shape, 3.1)}

    def forward(self, values: Tensor) -> Tensor:
        """`log a` `[B, T, K]` of every token, from its value."""
        gates = torch.einsum("btke,ke->btk", values, self.weight.to(values.dtype))
        return nn.functional.logsigmoid(gates + self.bias.to(values.dtype)) / 16
