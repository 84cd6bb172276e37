"""Attention of a decoder to an encoder's output, which is summed up once: the memory of a linear attention, or tokens.

A local branch reads the source's group of the same number as the query's own.
"""

import torch
from torch import Tensor

from .attention_lin_jax import Mixer
from .both_sides_lin_jax import folded
from .linear_attention_lin_jax import LinearAttention
from .other_attention_lin_jax import FullAttention
from .recurrence_lin_jax import State, weighted_values, wide


def condense(mixer: Mixer, keys: Tensor, values: Tensor, real: Tensor) -> State:
    """Sums an encoder's output up for a decoder: tensors whose first axis is the batch.

    Args:
        mixer: what mixes.
        keys: `[B, S, K, D]`.
        values: `[B, S, K, E]`.
        real: `[B, S]` whether there is a token.
    """
    source: State = {}
    with torch.autocast(keys.device.type, enabled=False):
        values = mixer.options.branch_values(values)
        if mixer.options.local or isinstance(mixer.attention, FullAttention):
            source = {"keys": keys, "values": values, "real": real}
        if isinstance(mixer.attention, LinearAttention):
            source["memory"] = folded(mixer.attention, wide(keys), wide(values), real)
    return source


def read(mixer: Mixer, queries: Tensor, positions: Tensor, source: State) -> Tensor:
    """Outputs `[B, T, H, E]` of a decoder's tokens.

    Args:
        mixer: what mixes.
        queries: `[B, T, H, D]`.
        positions: `[B, T]` of the queries in their own rows.
        source: result of `condense`.
    """
    given, attention, local = queries, mixer.attention, mixer.options.local_branch(queries.shape[-1])
    with torch.autocast(queries.device.type, enabled=False):
        kv_heads = source["memory" if "memory" in source else "keys"].shape[1 if "memory" in source else 2]
        queries, parts = wide(queries).unflatten(2, (kv_heads, -1)), []
        if local is not None:
            size = mixer.options.sizes["group_size"]
            group = torch.arange(source["real"].shape[1], device=queries.device) // size
            same = (positions[..., None] // size == group) & source["real"][:, None]
            weights = local.weights(queries, wide(source["keys"]), same)
            parts.append(weighted_values(weights, wide(source["values"])))
        if isinstance(attention, FullAttention):
            seen = source["real"][:, None].expand(-1, queries.shape[1], -1)
            seen = seen | ~seen.any(-1, keepdim=True)  # a row of nothing would be no numbers
            tokens = queries, wide(source["keys"]), wide(source["values"])
            parts.append(attention.outputs(tokens, seen, seen.sum(-1, keepdim=True)))
        elif attention is not None:
            sums = torch.einsum("btkrm,bkme->btkre", attention.query_features(queries), source["memory"])
            parts.append(attention.finish(sums))
        if attention is not None and mixer.factor is not None:
            parts[-1] = mixer.factor.to(parts[-1].dtype) * parts[-1]
        mixed = mixer.options.combined(sum(parts), None).flatten(2, 3)
    return mixed.to(given.dtype)
