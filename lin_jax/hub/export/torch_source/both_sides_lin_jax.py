"""The token mixers of encoders: every token sees both sides of its row, and there is no state.

Groups are those of positions in whole rows. Tokens that are not there are seen by none; what they see is of no use.
"""

import math

import torch
from torch import Tensor, nn

from .attention_lin_jax import Mixer
from .linear_attention_lin_jax import LinearAttention, Yoso
from .other_attention_lin_jax import FullAttention, GroupSoftmax, Linformer, SlidingSoftmax
from .recurrence_lin_jax import masked_weights, pair_scores, softmax_weights, unit, weighted_values, wide
from .windowed_attention_lin_jax import Window, WindowedMemory


def mix_both_sides(mixer: Mixer, queries: Tensor, keys: Tensor, values: Tensor, real: Tensor) -> Tensor:
    """Outputs `[B, T, H, E]` of an encoder's rows.

    Args:
        mixer: what mixes.
        queries: `[B, T, H, D]`, H a multiple of K.
        keys: `[B, T, K, D]`.
        values: `[B, T, K, E]`.
        real: `[B, T]` whether there is a token.
    """
    with torch.autocast(queries.device.type, enabled=False):
        given, queries = values, wide(queries).unflatten(2, (keys.shape[2], -1))
        keys, values = wide(keys), wide(values)
        between = None if mixer.bias is None else mixer.bias(_distances(real)[None])
        if mixer.windowed is not None:
            mixed = _windowed(mixer, queries, keys, values, real, between)
        else:
            summed, local = mixer.options.branch_values(values), mixer.options.local_branch(queries.shape[-1])
            mixed = queries.new_zeros(*queries.shape[:-1], values.shape[-1])
            if local is not None:
                bias = None if mixer.local_bias is None else between
                mixed = weighted_values(local.weights(queries, keys, _same_group(mixer, real), bias), summed)
            if mixer.attention is not None:
                base = _base(mixer, queries, keys, summed, real, between)
                mixed = mixed + (base if mixer.factor is None else mixer.factor.to(base.dtype) * base)
        mixed = mixer.options.combined(mixed, values).flatten(2, 3)
        if mixer.convolution is not None:
            shown = values if mixer.options.sizes["convolve_padding"] else values * real[..., None, None]
            mixed = mixed + _convolved(mixer.convolution.weight, shown)
    return mixed.to(given.dtype)


def _base(mixer: Mixer, queries: Tensor, keys: Tensor, values: Tensor, real: Tensor, bias: Tensor | None) -> Tensor:
    """Outputs `[B, T, K, R, E]` of the attention alone."""
    attention, seen = mixer.attention, real[:, None].expand(-1, real.shape[1], -1)
    match attention:
        case Yoso():
            cosines = pair_scores(unit(queries), unit(keys)).clamp(-1 + 1e-6, 1 - 1e-6)
            chance = (1 - cosines.arccos() / math.pi) ** attention.bits
            return unit(weighted_values(masked_weights(chance, seen), values))
        case LinearAttention():
            memory = folded(attention, keys, values, real)
            return attention.finish(torch.einsum("btkrm,bkme->btkre", attention.query_features(queries), memory))
        case GroupSoftmax():
            weights = softmax_weights(queries, keys, _or_itself(_same_group(mixer, real)), bias)
            return weighted_values(weights, values)
        case FullAttention():
            count = seen.sum(-1, keepdim=True).clamp(min=1)
            seen = _or_itself(seen) if attention.weights == "softmax" else seen
            return attention.outputs((queries, keys, values), seen, count, bias)
        case SlidingSoftmax():
            near = seen & (_distances(real).abs() < attention.window)
            return weighted_values(softmax_weights(queries, keys, _or_itself(near), bias, attention.scale), values)
        case Linformer():
            return _summaries_read(attention, mixer.options.sizes["group_size"], queries, keys, values, real)
    raise ValueError(f"attention '{mixer.options.sizes['name']}' has no form for encoders")


def _or_itself(seen: Tensor) -> Tensor:
    """The pairs `[B, T, T]`, and of a token that sees none, itself."""
    itself = torch.eye(seen.shape[1], dtype=torch.bool, device=seen.device) & ~seen.any(-1, keepdim=True)
    return seen | itself


def _distances(real: Tensor) -> Tensor:
    """`[T, T]` how far a token is before another."""
    places = torch.arange(real.shape[1], device=real.device)
    return places[:, None] - places


def folded(attention: LinearAttention, keys: Tensor, values: Tensor, real: Tensor) -> Tensor:
    """The memory `[B, K, M, E]` of all tokens that are there."""
    values = attention.extended(values) * real[..., None, None]
    return torch.einsum("bskm,bske->bkme", attention.key_features(keys), values)


def _same_group(mixer: Mixer, real: Tensor) -> Tensor:
    """The pairs `[B, T, S]` inside a group."""
    group = torch.arange(real.shape[1], device=real.device) // mixer.options.sizes["group_size"]
    return (group[:, None] == group) & real[:, None]


def _summaries_read(
    attention: Linformer, size: int, queries: Tensor, keys: Tensor, values: Tensor, real: Tensor
) -> Tensor:
    """Softmax over the summaries of all groups, unfinished ones included."""
    room = (0, 0, 0, 0, 0, -real.shape[1] % size)
    there = nn.functional.pad(real, room[-2:]).unflatten(1, (-1, size))
    projections, found = (attention.key_projection, attention.value_projection), []
    for projection, x in zip(projections, (keys, values), strict=True):
        groups = nn.functional.pad(x * real[..., None, None], room).unflatten(1, (-1, size))
        found.append(torch.einsum("sr,bgskd->bgrkd", projection.to(x.dtype), groups).flatten(1, 2))
    rank = attention.key_projection.shape[1]
    seen = there.any(-1).repeat_interleave(rank, dim=1)[:, None].expand(-1, real.shape[1], -1)
    scores = pair_scores(queries, found[0]) * queries.shape[-1] ** -0.5
    scores = scores.masked_fill(~seen[:, None, None], torch.finfo(scores.dtype).min)
    return weighted_values(scores.softmax(-1), found[1])


def _windowed(mixer: Mixer, queries: Tensor, keys: Tensor, values: Tensor, real: Tensor, bias: Tensor | None) -> Tensor:
    """A window on both sides, and the memory of what is beyond it, under one normaliser."""
    windowed: WindowedMemory = mixer.windowed
    if windowed.decay is not None or windowed.balance is None:
        raise ValueError("attention.decay is for causal models; it has no form for encoders")
    linear, near = mixer.attention, _near(windowed.window, real)
    weights = pair_scores(linear.query_features(queries), linear.key_features(keys))
    far = weighted_values(masked_weights(weights, real[:, None] & ~near), linear.extended(values))
    return windowed.normalised(linear, queries, keys, values, near, far, bias)


def _near(window: Window, real: Tensor) -> Tensor:
    """The pairs `[B, T, S]` that are in each other's windows, which reach as far to either side."""
    places = torch.arange(real.shape[1], device=real.device)
    if window.tokens is not None:
        near = (places[:, None] - places).abs() < window.tokens
    else:
        near = (places[:, None] // window.group_size - places // window.group_size).abs() <= window.groups
    return (near | (places < window.sinks)) & real[:, None]


def _convolved(kernel: Tensor, values: Tensor) -> Tensor:
    """Values `[B, T, H, E]` under a centred kernel `[H, 1, K, 1]`, in which tap j sees `v[t + j - K // 2]`."""
    heads, _, size, _ = kernel.shape
    batch, _, kv_heads, width = values.shape
    signals = values.repeat_interleave(heads // kv_heads, dim=2).permute(0, 3, 2, 1).flatten(0, 1)
    filtered = nn.functional.conv1d(signals, wide(kernel)[:, :, :, 0], padding=size // 2, groups=heads)
    return filtered.unflatten(0, (batch, width)).permute(0, 3, 2, 1)
