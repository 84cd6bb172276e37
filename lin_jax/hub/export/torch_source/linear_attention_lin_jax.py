"""Linear attentions: `finish(sum phi(q_t)·phi(k_s) v_s)`, with the memory `sum phi(k) v^T` of finished groups as state.

They differ in the feature map phi, in whether the query's own group takes part, and in what becomes of the sums.
Random projections are not learnt; they are buffers, saved with the model.
"""

import math

import torch
from torch import Tensor, nn

from .recurrence_lin_jax import Piece, State, masked_weights, pair_scores, unit, weighted_values, wide


class LinearAttention(nn.Module):
    """What linear attentions share.

    Attributes:
        own_group: whether keys of the query's own group take part beside those of earlier groups.
        normalised: whether values have a one behind them, so that the last of the sums is the normaliser.

    Args:
        features: size M of phi.
    """

    own_group = True
    normalised = False

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    def query_features(self, queries: Tensor) -> Tensor:
        """`phi(q)`, `[..., M]`, of queries `[..., D]` in float32 or better."""
        raise NotImplementedError

    def key_features(self, keys: Tensor) -> Tensor:
        """`phi(k)`; the same as of queries, unless a subclass says otherwise."""
        return self.query_features(keys)

    def finish(self, sums: Tensor) -> Tensor:
        """Outputs `[B, N, K, R, E]` from the sums."""
        return sums

    def empty_state(self, keys: Tensor, values: Tensor) -> State:
        """An empty memory for keys and values of these shapes and types."""
        batch, _, kv_heads, size = values.shape
        return {"memory": wide(values.new_zeros(batch, kv_heads, self.features, size + self.normalised))}

    def forward(self, queries: Tensor, piece: Piece, state: State) -> tuple[Tensor, State]:
        """Outputs `[B, N, K, R, E]` of a piece, over the pairs that it needs and the memory; and the state after it."""
        mask = piece.same_group | piece.earlier_group if self.own_group else piece.earlier_group
        queries, memory = self.query_features(queries), state["memory"]
        weights = pair_scores(queries, self.key_features(wide(piece.group_keys)))
        sums = weighted_values(masked_weights(weights, mask), self._extended(wide(piece.group_values)))
        sums = sums + torch.einsum("btkrm,bkme->btkre", queries, memory)
        if piece.finished.any():
            memory = torch.where(piece.finished[:, None, None, None], memory + self._fold(*piece.first_group), memory)
        return self.finish(sums), {"memory": memory}

    def _fold(self, keys: Tensor, values: Tensor) -> Tensor:
        """What a group adds to the memory, `[B, K, M, E]`."""
        return torch.einsum("bskm,bske->bkme", self.key_features(keys), self._extended(values))

    def _extended(self, values: Tensor) -> Tensor:
        return nn.functional.pad(values, (0, 1), value=1.0) if self.normalised else values


class FlashGlobal(LinearAttention):
    """FLASH's grouped branch: `sum q_t·k_s v_s` over earlier groups, of unit queries and keys."""

    own_group = False

    def query_features(self, queries: Tensor) -> Tensor:
        """Unit vectors."""
        return unit(queries)


class ReluAttention(LinearAttention):
    """`phi(x) = relu(x)`, divided by the sum of weights."""

    normalised = True

    def query_features(self, queries: Tensor) -> Tensor:
        """Rectified queries."""
        return queries.relu()

    def finish(self, sums: Tensor) -> Tensor:
        """Sums divided by the normaliser; no weights at all give zero."""
        normaliser = sums[..., -1:]
        return sums[..., :-1] / torch.where(normaliser == 0, 1, normaliser)


class TransNormer(LinearAttention):
    """`phi(x) = elu(x) + 1`, all heads together scaled to a root mean square of one."""

    def query_features(self, queries: Tensor) -> Tensor:
        """Positive queries."""
        return nn.functional.elu(queries) + 1

    def finish(self, sums: Tensor) -> Tensor:
        """Scaled sums."""
        return sums * (sums.square().mean((-3, -2, -1), keepdim=True) + 1e-6).rsqrt()


class RandomProjection(LinearAttention):
    """Features by random directions.

    Args:
        features: size M of phi.
        head_dim: size D of queries and keys.
        directions: how many.
    """

    def __init__(self, features: int, head_dim: int, directions: int) -> None:
        super().__init__(features)
        self.register_buffer("projection", torch.zeros(directions, head_dim))

    def initial_values(self) -> dict[str, Tensor]:
        """Newly drawn Gaussian directions."""
        return {"projection": torch.randn(self.projection.shape)}

    def project(self, x: Tensor) -> Tensor:
        """`w·x` for every direction."""
        return x @ self.projection.to(x.dtype).T


class OrthogonalProjection(RandomProjection):
    """Features by random directions that are orthogonal in blocks of D."""

    def initial_values(self) -> dict[str, Tensor]:
        """Newly drawn directions of Gaussian lengths."""
        count, size = self.projection.shape
        blocks = [torch.linalg.qr(torch.randn(size, size))[0] for _ in range(-(-count // size))]
        return {"projection": torch.cat(blocks)[:count] * torch.randn(count, size).norm(dim=-1, keepdim=True)}


class Performer(OrthogonalProjection):
    """FAVOR+: `phi(x) = exp(w·x' - |x'|^2 / 2) / M^0.5` with `x' = x / D^0.25`, divided by the sum of weights."""

    normalised = True
    finish = ReluAttention.finish

    def __init__(self, features: int, head_dim: int) -> None:
        super().__init__(features, head_dim, features)

    def query_features(self, queries: Tensor) -> Tensor:
        """Positive features, the largest of each query about one, which the normaliser cancels."""
        exponent = self._exponent(queries)
        return (exponent - exponent.amax(-1, keepdim=True).detach()).exp()

    def key_features(self, keys: Tensor) -> Tensor:
        """Positive features; exponents are capped, so that float32 holds sums of products."""
        return self._exponent(keys).clamp(max=40).exp() / math.sqrt(self.features)

    def _exponent(self, x: Tensor) -> Tensor:
        scaled = x / x.shape[-1] ** 0.25
        return self.project(scaled) - scaled.square().sum(-1, keepdim=True) / 2


class RandomFeatureAttention(OrthogonalProjection):
    """RFA: `phi(x) = [sin(w·x), cos(w·x)] (2 / M)^0.5` of unit vectors, divided by the sum of weights."""

    normalised = True

    def __init__(self, features: int, head_dim: int) -> None:
        super().__init__(features // 2 * 2, head_dim, features // 2)

    def query_features(self, queries: Tensor) -> Tensor:
        """Sines and cosines."""
        angles = self.project(unit(queries))
        return torch.cat([angles.sin(), angles.cos()], dim=-1) * math.sqrt(2 / self.features)

    def finish(self, sums: Tensor) -> Tensor:
        """Sums divided by the normaliser, which may be negative by chance and counts at least 0.01."""
        return sums[..., :-1] / sums[..., -1:].clamp(min=1e-2)


class Yoso(RandomProjection):
    """YOSO: hashes of `bits` signs each. `phi(x)` marks the row of x's hash in each of m tables of `2^bits` rows.

    The memory is the tables. `phi(q)·phi(k)` is the share of tables in which q and k collide.
    """

    def __init__(self, hashes: int, bits: int, head_dim: int) -> None:
        super().__init__(hashes * 2**bits, head_dim, hashes * bits)
        self.hashes, self.bits = hashes, bits

    def query_features(self, queries: Tensor) -> Tensor:
        """Marks divided by the number of tables."""
        return self.key_features(queries) / self.hashes

    def key_features(self, keys: Tensor) -> Tensor:
        """Marks, a one in each table."""
        signs = (self.project(keys) > 0).unflatten(-1, (self.hashes, self.bits))
        rows = (signs * 2 ** torch.arange(self.bits, device=keys.device)).sum(-1)
        return nn.functional.one_hot(rows, 2**self.bits).flatten(-2).to(keys.dtype)

    def finish(self, sums: Tensor) -> Tensor:
        """Sums scaled to length one."""
        return unit(sums)

    def expected(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """What tables stand for: `unit(sum_s (1 - arccos(q·k) / pi)^bits v_s)`, `[B, T, K, R, E]` of whole rows."""
        cosines = pair_scores(unit(queries), unit(keys)).clamp(-1 + 1e-6, 1 - 1e-6)
        return unit(weighted_values(((1 - cosines.arccos() / math.pi) ** self.bits).tril(), values))
