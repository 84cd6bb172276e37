"""FLASH, gated attention units over any token mixer, decoding on a recurrent state."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from .attention_lin_jax import (
    AttentionOptions,
    Conventions,
    Mixer,
    build_attention,
    build_convolution,
    build_factor,
    build_window,
    mix_tokens,
)
from .cache_lin_jax import LinJaxCache  # noqa: F401 - from a folder, transformers 4 copies what is named here, no more
from .causal_lm_lin_jax import LinJaxForCausalLM, LinJaxModel
from .configuration_lin_jax import LinJaxFlashConfig
from .drafts_lin_jax import NGrams  # noqa: F401
from .int8_lin_jax import Int8Linear  # noqa: F401
from .linear_attention_lin_jax import LinearAttention  # noqa: F401
from .other_attention_lin_jax import FullAttention  # noqa: F401
from .pretrained_lin_jax import LinJaxPreTrainedModel  # noqa: F401
from .recurrence_lin_jax import Rows, State, wide
from .relative_bias_lin_jax import relative_bias
from .speculation_lin_jax import decode  # noqa: F401
from .versions_lin_jax import require_version  # noqa: F401
from .windowed_attention_lin_jax import WindowedMemory  # noqa: F401

FLASH = Conventions(two_branches=True, bias_on_scores=True, softmax_scale="length")

Rotations = tuple[Tensor, Tensor]
"""Cosines and sines `[B, T, 1, R/2]`."""


class ScaleNorm(nn.Module):
    """`x / max(rms(x), eps) * g`, with a single scale, in float32 or better."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1))
        self.eps = eps

    def initial_values(self) -> dict[str, Tensor]:
        """One."""
        return {"g": torch.ones(1)}

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last axis."""
        exact = wide(x)
        normed = exact * exact.square().mean(-1, keepdim=True).clamp(min=self.eps**2).rsqrt()
        return (normed * self.g.to(normed.dtype)).to(x.dtype)


class OffsetScale(nn.Module):
    """Scaled and shifted copies of one small projection: queries and keys of both branches.

    Args:
        copies: how many.
        size: of the projection.
    """

    def __init__(self, copies: int, size: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(copies, size))
        self.beta = nn.Parameter(torch.zeros(copies, size))

    def initial_values(self) -> dict[str, Tensor]:
        """Small random factors and no shifts."""
        return {"gamma": torch.randn(self.gamma.shape) * 0.02, "beta": torch.zeros(self.beta.shape)}

    def forward(self, x: Tensor) -> Tensor:
        """The copies `[B, T, M, S]`."""
        return x[:, :, None] * self.gamma + self.beta


class RelativeBias(nn.Module):
    """A learnt number for every bucket of distances."""

    def __init__(self, buckets: int) -> None:
        super().__init__()
        self.relative_attention_bias = nn.Embedding(buckets, 1)


class LinJaxFlashUnit(nn.Module):
    """One layer: `x + out(gate * attention(q, k, v))`, in one head."""

    def __init__(self, config: LinJaxFlashConfig, layer: int) -> None:
        super().__init__()
        size, inner, self.size = config.hidden_size, config.inner_size, config.query_key_size
        self.shifted = math.ceil(size / 2) if config.shift_tokens else 0
        self.norm = ScaleNorm(config.norm_eps) if config.norm == "scale" else nn.LayerNorm(size, eps=config.norm_eps)
        self.to_hidden = nn.Sequential(nn.Linear(size, 2 * inner), nn.SiLU())
        self.to_qk = nn.Sequential(nn.Linear(size, self.size), nn.SiLU())
        self.options = AttentionOptions.of(config.attention, layer, FLASH)
        branches = 2 if self.options.grouped else 1
        self.qk_offset_scale = OffsetScale(2 * branches, self.size)
        self.rel_pos_bias = RelativeBias(config.relative_buckets)
        self.most = config.relative_max_distance
        self.to_out = nn.Linear(inner, size)
        heads = {"heads": 1, "kv_heads": 1}
        self.mixer = build_attention(self.options, branches * self.size, layer, **heads)
        self.windowed = build_window(self.options, inner, **heads)
        self.global_factor = build_factor(self.options)
        self.dwconv = build_convolution(self.options, 1)

    def initial_values(self) -> dict[str, Tensor]:
        """The start of the learnt factor."""
        return {} if self.global_factor is None else {"global_factor": build_factor(self.options).data}

    def forward(self, x: Tensor, rotations: Rotations, rows: Rows, state: State | None) -> tuple[Tensor, State | None]:
        """Outputs `[B, T, E]`, and the state after them if one was given."""
        given, kept = self.norm(x).tensor_split([self.shifted], dim=2)
        before = (state or {}).get("shift", given.new_zeros(given.shape[0], self.shifted))
        previous = torch.cat([before[:, None].to(given.dtype), given[:, :-1]], dim=1)
        seen = torch.cat([previous, kept], dim=2)
        values, gate = self.to_hidden(seen).chunk(2, dim=2)
        queries, keys = rotate_neighbours(self.qk_offset_scale(self.to_qk(seen)), rotations).chunk(2, dim=2)
        inputs = (given, queries.flatten(2)[:, :, None], keys.flatten(2)[:, :, None], values[:, :, None])
        if rows.mixers is not None:
            rows.mixers.append(partial(self.mix, *inputs))
        mixed, after = self.mix(*inputs, Rows(rows.position, rows.count), state)
        return x + self.to_out(gate * mixed[:, :, 0]), after

    def mix(
        self, given: Tensor, queries: Tensor, keys: Tensor, values: Tensor, rows: Rows, state: State | None
    ) -> tuple[Tensor, State | None]:
        """Outputs `[B, T, 1, inner]` of the token mixer, and the state of the unit after these rows if one was given.

        Args:
            given: `[B, T, F]` features that the next token takes from each.
            queries: `[B, T, 1, D]`; of both branches, if there are two, like the keys.
            keys: `[B, T, 1, D]`.
            values: `[B, T, 1, inner]`.
            rows: where the tokens stand.
            state: what came before; empty is nothing.
        """
        mixer = Mixer(self.options, self.mixer, self.global_factor, self.dwconv, self.windowed, self._bias)
        mixed, after = mix_tokens(mixer, queries, keys, values, rows, state)
        if after is not None:
            last = (rows.count - 1).clamp(min=0)[:, None, None]
            newest = given.take_along_dim(last, dim=1)[:, 0] if given.shape[2] else given[:, 0]
            before = state.get("shift", torch.zeros_like(newest))
            after["shift"] = torch.where((rows.count > 0)[:, None], newest, before.to(newest.dtype))
        return mixed, after

    def _bias(self, distances: Tensor) -> Tensor:
        table = self.rel_pos_bias.relative_attention_bias.weight * self.size**0.5
        return relative_bias(table, distances, self.most, 1)


class PositionScale(nn.Module):
    """The scale of the waves of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


class LinJaxFlashForCausalLM(LinJaxForCausalLM, LinJaxModel):
    """A FLASH as a language model; its trunk has no name of its own."""

    config_class = LinJaxFlashConfig
    base_model_prefix = ""
    _no_split_modules = ["LinJaxFlashUnit"]
    _input_embed_layer = "token_emb"

    def __init__(self, config: LinJaxFlashConfig) -> None:
        super().__init__(config)
        self.token_emb = nn.Embedding(config.vocab_size, config.hidden_size)
        self.abs_pos_emb = PositionScale()
        self.layers = nn.ModuleList(LinJaxFlashUnit(config, layer) for layer in range(config.num_hidden_layers))
        norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.to_logits = nn.Sequential(norm, nn.Linear(config.hidden_size, config.vocab_size))
        self.post_init()

    @property
    def base_model(self) -> nn.Module:
        """The model itself."""
        return self

    @property
    def lm_head(self) -> nn.Linear:
        """The head."""
        return self.to_logits[1]

    def trunk(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        """The vectors that the head reads; arguments are those of `LinJaxModel.forward`."""
        return LinJaxModel.forward(self, *args, **kwargs)

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding."""
        return self.token_emb

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replaces the embedding."""
        self.token_emb = value

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.to_logits[1]

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replaces the head."""
        self.to_logits[1] = value

    def layer_stack(self) -> nn.ModuleList:
        """The units."""
        return self.layers

    def enter(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Rotations]:
        """Embeddings of tokens and waves of positions, added; and the rotations at the positions."""
        cos, sin = waves(positions, self.config.hidden_size, wide(x).dtype)
        scaled = torch.cat([sin, cos], dim=-1) * self.abs_pos_emb.scale.to(sin.dtype)
        cos, sin = waves(positions, min(32, self.config.query_key_size), wide(x).dtype)
        return x + scaled.to(x.dtype), (cos[:, :, None], sin[:, :, None])

    def leave(self, x: Tensor) -> Tensor:
        """The final norm."""
        return self.to_logits[0](x)


def waves(positions: Tensor, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[B, T, size/2]` at positions `[B, T]`."""
    exponents = torch.arange(0, size, 2, dtype=torch.float64, device=positions.device) / size
    angles = positions[..., None].to(dtype) * (10000.0**-exponents).to(dtype)
    return angles.cos(), angles.sin()


def rotate_neighbours(vectors: Tensor, rotations: Rotations) -> Tensor:
    """Rotates the pairs `(x_{2k}, x_{2k+1})` of the first features of `[B, T, M, S]`."""
    cos, sin = rotations
    turned, kept = vectors.tensor_split([2 * cos.shape[-1]], dim=-1)
    first, second = turned.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
    return torch.cat([turned.to(vectors.dtype), kept], dim=-1)
