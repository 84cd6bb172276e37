"""LLaMA (and with other options Mistral, Qwen2, Qwen3) with linear attention, decoding on a recurrent state."""

from functools import partial

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .attention_lin_jax import (
    AttentionOptions,
    Mixer,
    build_attention,
    build_convolution,
    build_factor,
    build_window,
    mix_tokens,
)
from .cache_lin_jax import LinJaxCache  # noqa: F401 - from a folder, transformers 4 copies what is named here, no more
from .causal_lm_lin_jax import LinJaxForCausalLM, LinJaxModel
from .configuration_lin_jax import LinJaxLlamaConfig
from .drafts_lin_jax import NGrams  # noqa: F401
from .int8_lin_jax import Int8Linear  # noqa: F401
from .linear_attention_lin_jax import LinearAttention  # noqa: F401
from .norms_lin_jax import LinJaxRMSNorm
from .other_attention_lin_jax import FullAttention  # noqa: F401
from .pretrained_lin_jax import LinJaxPreTrainedModel  # noqa: F401
from .recurrence_lin_jax import Rows, State, wide
from .speculation_lin_jax import decode  # noqa: F401
from .versions_lin_jax import require_version  # noqa: F401
from .windowed_attention_lin_jax import WindowedMemory  # noqa: F401

Rotations = tuple[Tensor, Tensor]
"""Cosines and sines `[B, T, 1, D/2]`."""


class LinJaxLlamaAttention(nn.Module):
    """Projections and rotary positions around a token mixer."""

    def __init__(self, config: LinJaxLlamaConfig, layer: int) -> None:
        super().__init__()
        size, self.head_dim = config.hidden_size, config.head_dim
        inner, inner_kv = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(size, inner, bias=config.attention_bias)
        self.k_proj = nn.Linear(size, inner_kv, bias=config.attention_bias)
        self.v_proj = nn.Linear(size, inner_kv, bias=config.attention_bias)
        self.o_proj = nn.Linear(inner, size, bias=config.output_bias)
        if config.query_key_norm:
            self.q_norm = LinJaxRMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = LinJaxRMSNorm(self.head_dim, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()
        self.options = AttentionOptions.of(config.attention, layer)
        self.turn = partial(turned, config=config) if self.options.turns else None
        heads = {"heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads}
        self.mixer = build_attention(self.options, self.head_dim, layer, **heads)
        self.windowed = build_window(self.options, self.head_dim, **heads)
        self.global_factor = build_factor(self.options)
        self.dwconv = build_convolution(self.options, config.num_attention_heads)

    def initial_values(self) -> dict[str, Tensor]:
        """Where the learnt factor starts."""
        return {} if self.global_factor is None else {"global_factor": build_factor(self.options).data}

    def forward(self, x: Tensor, rotations: Rotations, rows: Rows, state: State | None) -> tuple[Tensor, State | None]:
        """Outputs `[B, T, E]`, and the state after them if one was given."""
        queries, keys, values = (
            part(x).unflatten(2, (-1, self.head_dim)) for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        queries, keys = self.q_norm(queries), self.k_norm(keys)
        if self.turn is None:
            queries, keys = rotate(queries, rotations), rotate(keys, rotations)
        mixer = Mixer(self.options, self.mixer, self.global_factor, self.dwconv, self.windowed, turn=self.turn)
        mixed, state = mix_tokens(mixer, queries, keys, values, rows, state)
        return self.o_proj(mixed.flatten(2)), state


class LinJaxLlamaMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: LinJaxLlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer to every token."""
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class LinJaxLlamaLayer(nn.Module):
    """One decoder layer."""

    def __init__(self, config: LinJaxLlamaConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = LinJaxRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LinJaxLlamaAttention(config, layer)
        self.post_attention_layernorm = LinJaxRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LinJaxLlamaMLP(config)

    def forward(self, x: Tensor, rotations: Rotations, rows: Rows, state: State | None) -> tuple[Tensor, State | None]:
        """Outputs `[B, T, E]`, and the state after them if one was given."""
        mixed, state = self.self_attn(self.input_layernorm(x), rotations, rows, state)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), state


class LinJaxLlamaModel(LinJaxModel):
    """Embedding, layers and final norm."""

    config_class = LinJaxLlamaConfig
    base_model_prefix = "model"
    _no_split_modules = ["LinJaxLlamaLayer"]

    def __init__(self, config: LinJaxLlamaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LinJaxLlamaLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = LinJaxRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def layer_stack(self) -> nn.ModuleList:
        """The layers."""
        return self.layers

    def enter(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Rotations]:
        """Embeddings, and the rotations at the positions."""
        return x, rotations_at(positions, self.config, wide(x).dtype)

    def leave(self, x: Tensor) -> Tensor:
        """The final norm."""
        return self.norm(x)


class LinJaxLlamaForCausalLM(LinJaxForCausalLM):
    """A LLaMA with linear attention and a language model's head."""

    config_class = LinJaxLlamaConfig
    base_model_prefix = "model"
    _no_split_modules = ["LinJaxLlamaLayer"]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LinJaxLlamaConfig) -> None:
        super().__init__(config)
        self.model = LinJaxLlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def rotations_at(positions: Tensor, config: LinJaxLlamaConfig, dtype: torch.dtype) -> Rotations:
    """Cosines and sines at positions `[B, T]`, with the frequency scalings of transformers.

    A recurrent state cannot rotate old keys anew when a text grows, so scalings that depend on the length take it to be
    `max_position_embeddings`.
    """
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
        frequencies, scale = config.rope_parameters["rope_theta"] ** -exponents, 1.0
    else:
        device, length = torch.device("cpu"), config.max_position_embeddings
        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, device, seq_len=length)
    angles = positions[..., None, None].to(dtype) * frequencies.to(positions.device, dtype)
    return angles.cos() * scale, angles.sin() * scale


def turned(vectors: Tensor, positions: Tensor, *, config: LinJaxLlamaConfig) -> Tensor:
    """Vectors `[B, T, ..., D]` rotated by the positions `[B, T]` of their tokens."""
    rotations = rotations_at(positions, config, wide(vectors).dtype)
    return rotate(vectors.flatten(2, -2), rotations).reshape(vectors.shape)


def rotate(vectors: Tensor, rotations: Rotations) -> Tensor:
    """Rotates the pairs `(x_k, x_{k + D/2})` of each head of `[B, T, H, D]`."""
    cos, sin = rotations
    first, second = vectors.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(vectors.dtype)
