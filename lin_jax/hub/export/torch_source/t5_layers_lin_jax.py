"""Layers of a T5: projections around token mixers, relative biases that all layers share, feed-forward layers."""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

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
from .both_sides_lin_jax import mix_both_sides
from .configuration_lin_jax import LinJaxT5Config
from .cross_attention_lin_jax import condense, read
from .norms_lin_jax import LinJaxRMSNorm
from .recurrence_lin_jax import Bias, Rows, State
from .relative_bias_lin_jax import relative_bias

T5 = Conventions(unit_values=True, merged_norm=True, softmax_scale="one")


class Places(NamedTuple):
    """Context of all decoder layers: the bias of distances, and the positions `[B, T]` of their tokens."""

    bias: Bias
    positions: Tensor


def random_values(shape: tuple[int, ...], deviation: float) -> dict[str, Tensor]:
    """Initial values of a matrix of weights."""
    return {"weight": torch.randn(shape) * deviation}


def scaled_start(module: nn.Module, config: LinJaxT5Config, deviation: float) -> Any:
    """A layer whose weights begin with a standard deviation, times the model's factor."""
    module.initial_values = partial(random_values, module.weight.shape, config.initializer_factor * deviation)
    return module


def projection(config: LinJaxT5Config, size_in: int, size_out: int, deviation: float) -> nn.Linear:
    """A linear layer without bias."""
    return scaled_start(nn.Linear(size_in, size_out, bias=False), config, deviation)


class LinJaxT5Attention(nn.Module):
    """Projections around a token mixer.

    Args:
        config: of the model.
        part: which of its attentions: encoder, decoder or cross.
        layer: number of the layer, from 0; the first has the biases of all layers.
    """

    def __init__(self, config: LinJaxT5Config, part: str, layer: int) -> None:
        super().__init__()
        size, self.heads, self.head_dim = config.d_model, config.num_heads, config.d_kv
        inner = self.heads * self.head_dim
        self.q = projection(config, size, inner, (size * self.head_dim) ** -0.5)
        self.k = projection(config, size, inner, size**-0.5)
        self.v = projection(config, size, inner, size**-0.5)
        self.o = projection(config, inner, size, inner**-0.5)
        self.options = AttentionOptions.of(config.attention[part], layer, T5)
        if part == "cross":  # A source has no window, and values that are read have no neighbours.
            self.options = replace(self.options, convolution=False, window=False)
        heads = {"heads": self.heads, "kv_heads": self.heads}
        self.mixer = build_attention(self.options, self.head_dim, layer, **heads)
        self.windowed = build_window(self.options, self.head_dim, **heads)
        self.alpha = build_factor(self.options)
        self.dwconv = build_convolution(self.options, self.heads)
        self.relative_attention_bias = None
        if part != "cross" and layer == 0:
            table = nn.Embedding(config.relative_attention_num_buckets, self.heads)
            self.relative_attention_bias = scaled_start(table, config, size**-0.5)

    def initial_values(self) -> dict[str, Tensor]:
        """The start of the learnt factor."""
        return {} if self.alpha is None else {"alpha": build_factor(self.options).data}

    def split(self, part: nn.Linear, x: Tensor) -> Tensor:
        """Projections `[B, T, H, D]` by heads."""
        return part(x).unflatten(2, (self.heads, self.head_dim))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[B, T, H, D]` of tokens that read each other."""
        return self.split(self.q, x), self.split(self.k, x), self.split(self.v, x)

    def mixing(self, bias: Bias | None = None) -> Mixer:
        """The parts of the token mixer."""
        return Mixer(self.options, self.mixer, self.alpha, self.dwconv, self.windowed, bias)


class LinJaxT5FeedForward(nn.Module):
    """`wo(relu(wi(x)))`, or `wo(gelu(wi_0(x)) * wi_1(x))` with GELU by tanh."""

    def __init__(self, config: LinJaxT5Config) -> None:
        super().__init__()
        size, inner = config.d_model, config.d_ff
        self.gated = config.feed_forward_proj == "gated-gelu"
        for name in ("wi_0", "wi_1") if self.gated else ("wi",):
            setattr(self, name, projection(config, size, inner, size**-0.5))
        self.wo = projection(config, inner, size, inner**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer to every token."""
        if self.gated:
            return self.wo(nn.functional.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))
        return self.wo(self.wi(x).relu())


class LinJaxT5SubLayer(nn.Module):
    """A part of a layer, under its name, and the norm before it."""

    def __init__(self, config: LinJaxT5Config, name: str, part: nn.Module) -> None:
        super().__init__()
        setattr(self, name, part)
        self.layer_norm = LinJaxRMSNorm(config.d_model, config.layer_norm_epsilon)


class LinJaxT5EncoderLayer(nn.Module):
    """One encoder layer."""

    def __init__(self, config: LinJaxT5Config, layer: int) -> None:
        super().__init__()
        attention = LinJaxT5SubLayer(config, "SelfAttention", LinJaxT5Attention(config, "encoder", layer))
        self.layer = nn.ModuleList([attention, LinJaxT5SubLayer(config, "DenseReluDense", LinJaxT5FeedForward(config))])

    def forward(self, x: Tensor, bias: Bias, real: Tensor) -> Tensor:
        """Outputs `[B, S, E]`."""
        first, last = self.layer
        attention = first.SelfAttention
        mixed = mix_both_sides(attention.mixing(bias), *attention.project(first.layer_norm(x)), real)
        x = x + attention.o(mixed.flatten(2))
        return x + last.DenseReluDense(last.layer_norm(x))


class LinJaxT5DecoderLayer(nn.Module):
    """One decoder layer. Its state holds what it reads of the encoder, under `source`, beside its mixer's."""

    def __init__(self, config: LinJaxT5Config, layer: int) -> None:
        super().__init__()
        parts = {
            "SelfAttention": LinJaxT5Attention(config, "decoder", layer),
            "EncDecAttention": LinJaxT5Attention(config, "cross", layer),
            "DenseReluDense": LinJaxT5FeedForward(config),
        }
        self.layer = nn.ModuleList(LinJaxT5SubLayer(config, name, part) for name, part in parts.items())

    def source(self, encoded: Tensor, real: Tensor) -> State:
        """The memory of an encoder's output `[B, S, E]`, of which the mask `[B, S]` says what is there."""
        attention = self.layer[1].EncDecAttention
        return condense(
            attention.mixing(), attention.split(attention.k, encoded), attention.split(attention.v, encoded), real
        )

    def forward(self, x: Tensor, context: Places, rows: Rows, state: State) -> tuple[Tensor, State]:
        """Outputs `[B, T, E]`, and the state after them: of the mixer's, None stays None."""
        own, cross, last = self.layer
        attention, source = own.SelfAttention, state["source"]
        inputs = attention.project(own.layer_norm(x))
        if rows.mixers is not None:
            rows.mixers.append(partial(self.mix, context.bias, inputs))
        mixed, after = self.mix(context.bias, inputs, Rows(rows.position, rows.count), state)
        x = x + attention.o(mixed.flatten(2))

        attention = cross.EncDecAttention
        queries = attention.split(attention.q, cross.layer_norm(x))
        found = read(attention.mixing(), queries, context.positions, source)
        x = x + attention.o(found.flatten(2))
        return x + last.DenseReluDense(last.layer_norm(x)), after

    def mix(self, bias: Bias, inputs: tuple[Tensor, Tensor, Tensor], rows: Rows, state: State) -> tuple[Tensor, State]:
        """Outputs `[B, T, H, D]` of the token mixer, and the layer's state after these tokens."""
        mixed, after = mix_tokens(self.layer[0].SelfAttention.mixing(bias), *inputs, rows, state["mixer"])
        return mixed, {"source": state["source"], "mixer": after}


def bias_of(table: nn.Embedding, config: LinJaxT5Config, *, both_sides: bool) -> Bias:
    """The biases of distances in all layers of a stack."""
    most, heads = config.relative_attention_max_distance, config.num_heads
    return lambda distances: relative_bias(table.weight, distances, most, heads, both_sides=both_sides)
