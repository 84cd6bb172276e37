"""FLASH, gated attention units over attention by groups, decoding on a recurrent state."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from .attention_lin_jax import AttentionOptions, CausalConvolution, build_convolution
from .cache_lin_jax import LinJaxCache  # noqa: F401 - from a folder, transformers 4 copies what is named here, no more
from .causal_lm_lin_jax import LinJaxForCausalLM, LinJaxModel
from .configuration_lin_jax import LinJaxFlashConfig
from .drafts_lin_jax import NGrams  # noqa: F401
from .int8_lin_jax import Int8Linear  # noqa: F401
from .linear_attention_lin_jax import LinearAttention
from .other_attention_lin_jax import LOCAL_SCORES
from .recurrence_lin_jax import (
    Piece,
    Rows,
    State,
    empty_group,
    masked_weights,
    pair_scores,
    unit,
    weighted_values,
    wide,
)
from .speculation_lin_jax import decode  # noqa: F401
from .versions_lin_jax import require_version  # noqa: F401
from .windowed_attention_lin_jax import WindowedMemory  # noqa: F401

Rotations = tuple[Tensor, Tensor]
"""Cosines and sines `[B, T, 1, R/2]`."""


class GroupedBranch(LinearAttention):
    """FLASH's grouped branch: `sum q_t·k_s v_s / G` over earlier groups, of the second halves of queries and keys.

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
    """A learnt number for every bucket of distances.

    Args:
        buckets: how many.
        most: distances from here on share the last bucket.
    """

    def __init__(self, buckets: int, most: int) -> None:
        super().__init__()
        self.relative_attention_bias = nn.Embedding(buckets, 1)
        self.most = most

    def forward(self, distances: Tensor) -> Tensor:
        """The biases of distances, of which negative ones count as zero."""
        count = self.relative_attention_bias.num_embeddings
        exact, distances = count // 2, distances.clamp(min=0)
        # In float32, as published: that decides which bucket a distance on an edge falls into.
        ratio = distances.clamp(min=exact).float() / exact
        far = exact + (ratio.log() / math.log(self.most / exact) * (count - exact)).long()
        return self.relative_attention_bias.weight[:, 0][
            torch.where(distances < exact, distances, far.clamp(max=count - 1))
        ]


class LinJaxFlashUnit(nn.Module):
    """One layer: `x + out(gate * attention(q, k, v))`, in one head."""

    def __init__(self, config: LinJaxFlashConfig, layer: int) -> None:
        super().__init__()
        size, inner, self.size = config.hidden_size, config.inner_size, config.query_key_size
        self.shifted = math.ceil(size / 2) if config.shift_tokens else 0
        self.norm = ScaleNorm(config.norm_eps) if config.norm == "scale" else nn.LayerNorm(size, eps=config.norm_eps)
        self.to_hidden = nn.Sequential(nn.Linear(size, 2 * inner), nn.SiLU())
        self.to_qk = nn.Sequential(nn.Linear(size, self.size), nn.SiLU())
        self.qk_offset_scale = OffsetScale(4, self.size)
        self.rel_pos_bias = RelativeBias(config.relative_buckets, config.relative_max_distance)
        self.to_out = nn.Linear(inner, size)
        self.options = AttentionOptions.of(config.attention, layer)
        grouped = self.options.base != "flash_local"
        self.mixer = GroupedBranch(self.size, self.options.sizes["group_size"]) if grouped else None
        self.dwconv: CausalConvolution | None = build_convolution(self.options, 1)

    def forward(self, x: Tensor, rotations: Rotations, rows: Rows, state: State | None) -> tuple[Tensor, State | None]:
        """Outputs `[B, T, E]`, and the state after them if one was given."""
        given, kept = self.norm(x).tensor_split([self.shifted], dim=2)
        before = (state or {}).get("shift", given.new_zeros(given.shape[0], self.shifted))
        previous = torch.cat([before[:, None].to(given.dtype), given[:, :-1]], dim=1)
        seen = torch.cat([previous, kept], dim=2)
        values, gate = self.to_hidden(seen).chunk(2, dim=2)
        queries, keys = rotate_neighbours(self.qk_offset_scale(self.to_qk(seen)), rotations).chunk(2, dim=2)
        inputs = (given, queries.flatten(2), keys.flatten(2), values)
        if rows.mixers is not None:
            rows.mixers.append(partial(self.mix, *inputs))
        mixed, after = self.mix(*inputs, rows, state or {})
        return x + self.to_out(gate * mixed), None if state is None else after

    def mix(
        self, given: Tensor, queries: Tensor, keys: Tensor, values: Tensor, rows: Rows, state: State
    ) -> tuple[Tensor, State]:
        """Outputs `[B, T, inner]` of the token mixer, and the state of the unit after these rows.

        Args:
            given: `[B, T, F]` features that the next token takes from each.
            queries: `[B, T, 2 S]` of both branches, like the keys.
            keys: `[B, T, 2 S]`.
            values: `[B, T, inner]`.
            rows: where the tokens stand.
            state: what came before; empty is nothing.
        """
        with torch.autocast(queries.device.type, enabled=False):
            heads = values[:, :, None]
            mixed, after = self._mix_pieces(wide(queries)[:, :, None, None], keys[:, :, None], heads, rows, state)
            if self.options.base == "linear_angular":
                mixed = unit(wide(heads)[..., None, :] / 2 + mixed / math.pi)
            mixed = mixed[:, :, 0, 0]
            if self.dwconv is not None:
                filtered, after["convolution"] = self.dwconv(heads, rows, state.get("convolution", {}))
                mixed = mixed + filtered[:, :, 0]
        last = (rows.count - 1).clamp(min=0)[:, None, None]
        newest = given.take_along_dim(last, dim=1)[:, 0] if given.shape[2] else given[:, 0]
        before = state.get("shift", torch.zeros_like(newest))
        after["shift"] = torch.where((rows.count > 0)[:, None], newest, before.to(newest.dtype))
        return mixed.to(values.dtype), after

    def _mix_pieces(
        self, queries: Tensor, keys: Tensor, values: Tensor, rows: Rows, state: State
    ) -> tuple[Tensor, State]:
        """Both branches, added, `[B, T, 1, 1, inner]`; and their state after these rows."""
        size, outputs = self.options.sizes["group_size"], []
        group = state.get("group") or empty_group(keys, values, size)
        memory = state.get("attention")
        if memory is None and self.mixer is not None:
            memory = self.mixer.empty_state(keys, values)
        for begin in range(0, keys.shape[1], size):
            part = slice(begin, begin + size)
            piece = Piece.of(keys[:, part], values[:, part], rows.piece(begin, size), size, group)
            group, asking = piece.unfinished_group, queries[:, part]
            mixed = asking.new_zeros(*asking.shape[:-1], values.shape[-1])
            if self.options.local:
                mixed = mixed + self._local(asking, piece)
            if self.mixer is not None:
                base, memory = self.mixer(asking, piece, memory)
                mixed = mixed + base
            outputs.append(mixed)
        return torch.cat(outputs, dim=1), {"group": group, "attention": memory}

    def _local(self, queries: Tensor, piece: Piece) -> Tensor:
        """The local branch of a piece: a score function of `q·k / G` and a bias, of the first halves."""
        scores = pair_scores(queries[..., : self.size], wide(piece.group_keys)[..., : self.size]) / piece.size
        bias = self.rel_pos_bias(piece.distances).to(scores.dtype) * self.size**0.5
        weights = LOCAL_SCORES[self.options.sizes["local_score"]](scores + bias[:, None, None])
        return weighted_values(masked_weights(weights, piece.same_group), wide(piece.group_values))


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
