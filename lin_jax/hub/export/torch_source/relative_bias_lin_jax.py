"""Relative biases: a learnt number for each head and bucket of distances, as T5 has them."""

import math

import torch
from torch import Tensor


def relative_bias(table: Tensor, distances: Tensor, most: int, kv_heads: int, *, both_sides: bool = False) -> Tensor:
    """Biases `[B, K, R, N, S]` of pairs.

    Args:
        table: `[buckets, H]`.
        distances: `[B, N, S]` how far a key is before a query.
        most: distances from here on share the last bucket.
        kv_heads: K, which H is a multiple of.
        both_sides: whether keys after the query have buckets of their own; else they count as distance 0.
    """
    found = table[relative_buckets(distances, table.shape[0], most, both_sides=both_sides)]
    return found.movedim(-1, 1).unflatten(1, (kv_heads, -1))


def relative_buckets(distances: Tensor, count: int, most: int, *, both_sides: bool = False) -> Tensor:
    """Buckets of distances: one each while they are small, then logarithmically wider."""
    first: Tensor | int = 0
    if both_sides:
        count //= 2
        first, distances = torch.where(distances < 0, count, 0), distances.abs()
    exact, distances = count // 2, distances.clamp(min=0)
    # In float32, as published: that decides which bucket a distance on an edge falls into.
    ratio = distances.clamp(min=exact).float() / exact
    far = exact + (ratio.log() / math.log(most / exact) * (count - exact)).long()
    return first + torch.where(distances < exact, distances, far.clamp(max=count - 1))
