"""Linear attentions: `finish(sum phi(q_t)·phi(k_s) v_s)`, with the memory `sum phi(k) v^T` of finished groups as state.

They differ in the feature map phi, in whether the query's own group takes part, and in what becomes of the sums.
Random projections are not learnt; they are buffers, saved with the model. Maps of each head are.
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

    def log_scale(self, queries: Tensor) -> Tensor:
        """The logarithm of what `query_features` divides by, which a normaliser must cancel; zero if nothing."""
        return queries.new_zeros(queries.shape[:-1])

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
        sums = weighted_values(masked_weights(weights, mask), self.extended(wide(piece.group_values)))
        sums = sums + torch.einsum("btkrm,bkme->btkre", queries, memory)
        if piece.finished.any():
            memory = torch.where(piece.finished[:, None, None, None], memory + self._fold(*piece.first_group), memory)
        return self.finish(sums), {"memory": memory}

    def _fold(self, keys: Tensor, values: Tensor) -> Tensor:
        """What a group adds to the memory, `[B, K, M, E]`."""
        return torch.einsum("bskm,bske->bkme", self.key_features(keys), self.extended(values))

    def extended(self, values: Tensor) -> Tensor:
        """Values as they are summed: with a one behind them where there is a normaliser."""
        return nn.functional.pad(values, (0, 1), value=1.0) if self.normalised else values


class FlashGlobal(LinearAttention):
    """FLASH's grouped branch: `sum q_t·k_s v_s` over earlier groups, of unit queries and keys."""

    own_group = False

    def query_features(self, queries: Tensor) -> Tensor:
        """Unit vectors."""
        return unit(queries)


class GroupedBranch(LinearAttention):
    """The grouped branch of a FLASH: `sum q_t·k_s v_s / G` over earlier groups, of queries' and keys' second halves.

    Args:
        features: size S of a half.
        group_size: tokens G in a group.
    """

    own_group = False

    def __init__(self, features: int, group_size: int) -> None:
        super().__init__(features)
        self.group_size = group_size

    def query_features(self, queries: Tensor) -> Tensor:
        """The second half."""
        return queries[..., self.features :]

    def finish(self, sums: Tensor) -> Tensor:
        """The sums divided by the size of a group."""
        return sums / self.group_size


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


class EluAttention(ReluAttention):
    """`phi(x) = elu(x) + 1`, divided by the sum of weights."""

    def query_features(self, queries: Tensor) -> Tensor:
        """Positive queries."""
        return nn.functional.elu(queries) + 1


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
        return {"projection": orthogonal_directions(*self.projection.shape)}


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

    def log_scale(self, queries: Tensor) -> Tensor:
        """The largest exponent of each query, less that of `M^0.5`."""
        return self._exponent(queries).amax(-1).detach() - math.log(self.features) / 2

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


class Hedgehog(ReluAttention):
    """`phi(x) = softmax([W x, -W x])` with learnt W of each head, divided by the sum of weights.

    Args:
        head_dim: size D of queries and keys.
        heads: query heads H.
        kv_heads: key/value heads K.
    """

    def __init__(self, head_dim: int, heads: int, kv_heads: int) -> None:
        super().__init__(2 * head_dim)
        self.query_map = nn.Parameter(torch.zeros(kv_heads, heads // kv_heads, head_dim, head_dim))
        self.key_map = nn.Parameter(torch.zeros(kv_heads, head_dim, head_dim))

    def initial_values(self) -> dict[str, Tensor]:
        """Identities."""
        maps = (("query_map", self.query_map), ("key_map", self.key_map))
        return {name: torch.eye(weight.shape[-1]).expand(weight.shape) for name, weight in maps}

    def query_features(self, queries: Tensor) -> Tensor:
        """Positive features that sum up to one."""
        projected = torch.einsum("btkrd,krmd->btkrm", queries, self.query_map.to(queries.dtype))
        return torch.cat([projected, -projected], dim=-1).softmax(-1)

    def key_features(self, keys: Tensor) -> Tensor:
        """Positive features that sum up to one."""
        projected = torch.einsum("bskd,kmd->bskm", keys, self.key_map.to(keys.dtype))
        return torch.cat([projected, -projected], dim=-1).softmax(-1)


class Exponential(ReluAttention):
    """Learnt `phi(x) = exp(W x' + b - |x'|^2 / 2) / M^0.5` with `x' = x c^0.5`, divided by the sum of weights.

    Args:
        features: size M of phi.
        head_dim: size D of queries and keys.
        heads: query heads H.
        kv_heads: key/value heads K.
        scale: c, that of softmax; None is `D^-0.5`.
    """

    def __init__(self, features: int, head_dim: int, heads: int, kv_heads: int, scale: float | None = None) -> None:
        super().__init__(features)
        self.root = (head_dim**-0.5 if scale is None else scale) ** 0.5
        share = heads // kv_heads
        self.key_map = nn.Parameter(torch.zeros(kv_heads, features, head_dim))
        self.key_bias = nn.Parameter(torch.zeros(kv_heads, features))
        self.query_map = nn.Parameter(torch.zeros(kv_heads, share, features, head_dim))
        self.query_bias = nn.Parameter(torch.zeros(kv_heads, share, features))

    def initial_values(self) -> dict[str, Tensor]:
        """Random directions, the same of keys and of the queries that see them; no biases."""
        start = torch.stack([orthogonal_directions(*head.shape) for head in self.key_map])
        return {
            "key_map": start,
            "key_bias": torch.zeros(self.key_bias.shape),
            "query_map": start[:, None].expand(self.query_map.shape),
            "query_bias": torch.zeros(self.query_bias.shape),
        }

    def query_features(self, queries: Tensor) -> Tensor:
        """Positive features, the largest of each query one, which a normaliser cancels."""
        exponents = self._exponents(queries)
        return (exponents - exponents.amax(-1, keepdim=True).detach()).exp()

    def key_features(self, keys: Tensor) -> Tensor:
        """Positive features; exponents are capped, so that float32 holds sums of products."""
        scaled = keys * self.root
        exponents = torch.einsum("bskd,kmd->bskm", scaled, self.key_map.to(keys.dtype)) + self.key_bias.to(keys.dtype)
        exponents = exponents - scaled.square().sum(-1, keepdim=True) / 2
        return exponents.clamp(max=40).exp() / math.sqrt(self.features)

    def log_scale(self, queries: Tensor) -> Tensor:
        """The largest exponent of each query, less that of `M^0.5`."""
        return self._exponents(queries).amax(-1).detach() - math.log(self.features) / 2

    def _exponents(self, queries: Tensor) -> Tensor:
        scaled = queries * self.root
        exponents = torch.einsum("btkrd,krmd->btkrm", scaled, self.query_map.to(queries.dtype))
        return exponents + self.query_bias.to(queries.dtype) - scaled.square().sum(-1, keepdim=True) / 2


class Clustered(Exponential):
    """Learnt clusters, `phi(k) = softmax(W k' + b)` and `phi(q) = exp(U q' + c)` with `x' = x c^0.5`.

    Arguments as for `Exponential`.
    """

    def key_features(self, keys: Tensor) -> Tensor:
        """Positive features that sum up to one."""
        exponents = torch.einsum("bskd,kmd->bskm", keys * self.root, self.key_map.to(keys.dtype))
        return (exponents + self.key_bias.to(keys.dtype)).softmax(-1)

    def log_scale(self, queries: Tensor) -> Tensor:
        """The largest exponent of each query."""
        return self._exponents(queries).amax(-1).detach()

    def _exponents(self, queries: Tensor) -> Tensor:
        exponents = torch.einsum("btkrd,krmd->btkrm", queries * self.root, self.query_map.to(queries.dtype))
        return exponents + self.query_bias.to(queries.dtype)


def orthogonal_directions(count: int, size: int) -> Tensor:
    """Random directions `[count, size]` of Gaussian lengths, orthogonal in blocks."""
    blocks = [torch.linalg.qr(torch.randn(size, size))[0] for _ in range(-(-count // size))]
    return torch.cat(blocks)[:count] * torch.randn(count, size).norm(dim=-1, keepdim=True)
