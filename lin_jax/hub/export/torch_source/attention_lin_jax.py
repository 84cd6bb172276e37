"""Token mixers by name, such as `performer+local+convolution`; `augmented` is `flash_global+local+convolution`.

`o_t = local + factor * base + sum_{j<W} w_j v_{t-j}`: an attention, a local branch inside groups and a convolution on
the values, each of them optional. They share one state, which `mix_tokens` carries from piece to piece. With `+window`
or a decay, attention and local branch are those of `WindowedMemory`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .linear_attention_lin_jax import (
    Clustered,
    EluAttention,
    Exponential,
    FlashGlobal,
    GroupedBranch,
    Hedgehog,
    Performer,
    RandomFeatureAttention,
    ReluAttention,
    TransNormer,
    Yoso,
)
from .other_attention_lin_jax import LOCAL_SCORES, FullAttention, GroupSoftmax, Linformer, LocalBranch, SlidingSoftmax
from .recurrence_lin_jax import Bias, Piece, Rows, State, empty_group, unit, wide
from .windowed_attention_lin_jax import Turn, Window, WindowedMemory

# Attentions by groups, after FLASH; and those that a local branch stands beside without a relative bias.
GROUPED = ("flash_local", "flash_global", "flash", "linear_angular")
WRAPPED = ("softmax", "square", "linformer", "transnormer", "yoso")


@dataclass(frozen=True)
class Conventions:
    """A model's way to prepare queries, keys, values and scores; the defaults are those of LLaMA, GPT-2 and BERT.

    Attributes:
        two_branches: attentions by groups have queries and keys of the local and of the grouped branch side by side,
            which are not of length one, and divide by the size of a group; the grouped branch has no learnt factor.
        unit_values: attentions by groups scale values to length one, but for the convolution.
        merged_norm: attentions by groups divide all heads' outputs together by `1e-4` plus their length.
        bias_on_scores: whether the relative bias of a local branch joins the scores; else the weights.
        softmax_scale: factor of softmax scores: `D^-0.5` (root), one, or the inverse of the tokens seen (length).
    """

    two_branches: bool = False
    unit_values: bool = False
    merged_norm: bool = False
    bias_on_scores: bool = False
    softmax_scale: str = "root"

    @property
    def scale(self) -> float | None:
        """Factor of softmax scores where they are not divided by a length; None is `D^-0.5`."""
        return 1.0 if self.softmax_scale == "one" else None


@dataclass(frozen=True)
class AttentionOptions:
    """The `attention` of a configuration, its name taken apart.

    Attributes:
        base: the attention; `flash_local` is the local branch alone.
        local: whether there is a local branch.
        factor: whether the attention beside a local branch has a learnt factor.
        convolution: whether there is a convolution.
        window: whether there is softmax over a window.
        sizes: all options of the configuration.
        conventions: the model's.
    """

    base: str
    local: bool
    factor: bool
    convolution: bool
    window: bool
    sizes: Mapping[str, Any]
    conventions: Conventions = Conventions()

    @classmethod
    def of(
        cls,
        attention: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        layer: int,
        conventions: Conventions = Conventions(),
    ) -> "AttentionOptions":
        """Reads a layer's of a configuration, in which all layers have one, or each its own."""
        attention = attention if isinstance(attention, Mapping) else attention[layer]
        name = attention["name"]
        base, *added = ("flash_global+local+convolution" if name == "augmented" else name).split("+")
        local = "local" in added or base in ("flash_local", "flash", "linear_angular")
        factor = "local" in added or base == "linear_angular"
        factor = factor and not (conventions.two_branches and base in GROUPED)
        return cls(base, local, factor, "convolution" in added, "window" in added, attention, conventions)

    @property
    def turns(self) -> bool:
        """True where the attention turns queries and keys by rotary positions itself, in its window alone."""
        return self.window and not self.sizes.get("rotary_memory", True)

    @property
    def grouped(self) -> bool:
        """True for attentions by groups."""
        return self.base in GROUPED

    def local_branch(self, head_dim: int) -> LocalBranch | None:
        """The local branch, if there is one, over queries and keys of a size."""
        if not self.local:
            return None
        score, on_scores = LOCAL_SCORES[self.sizes["local_score"]], self.conventions.bias_on_scores
        if self.grouped and self.conventions.two_branches:
            return LocalBranch(score, False, 1 / self.sizes["group_size"], head_dim // 2, on_scores)
        return LocalBranch(score, bias_on_scores=on_scores)

    def branch_values(self, values: Tensor) -> Tensor:
        """Values as the branches sum them up."""
        return unit(wide(values)).to(values.dtype) if self.grouped and self.conventions.unit_values else values

    def combined(self, outputs: Tensor, values: Tensor | None) -> Tensor:
        """Finishes the branches' sum `[B, T, K, R, E]`, with the values of the tokens themselves, if there are any."""
        if self.base == "linear_angular" and values is not None:
            outputs = unit(wide(values)[..., None, :] / 2 + outputs / math.pi)
        if self.grouped and self.conventions.merged_norm:
            outputs = outputs / (1e-4 + outputs.flatten(2).norm(dim=-1)[..., None, None, None])
        return outputs


def build_attention(
    options: AttentionOptions, head_dim: int, layer: int, *, heads: int, kv_heads: int
) -> nn.Module | None:
    """The attention that a configuration names, without what is added to it; None where that is all there is.

    Args:
        options: name and sizes.
        head_dim: size D of queries and keys.
        layer: number of the layer, from 0.
        heads: query heads H.
        kv_heads: key/value heads K.

    Raises:
        ValueError: the name is unknown.
    """
    sizes, conventions = options.sizes, options.conventions
    features = sizes["features"] or 2 * head_dim
    match options.base:
        case "flash_local":
            return None
        case "flash_global" | "flash" | "linear_angular" if conventions.two_branches:
            return GroupedBranch(head_dim // 2, sizes["group_size"])
        case "flash_global" | "flash" | "linear_angular":
            return FlashGlobal(head_dim)
        case "relu":
            return ReluAttention(head_dim)
        case "elu":
            return EluAttention(head_dim)
        case "hedgehog":
            return Hedgehog(head_dim, heads, kv_heads)
        case "exponential":
            return Exponential(features, head_dim, heads, kv_heads, conventions.scale)
        case "clustered":
            return Clustered(features, head_dim, heads, kv_heads, conventions.scale)
        case "performer":
            return Performer(features, head_dim)
        case "rfa":
            return RandomFeatureAttention(features, head_dim)
        case "yoso":
            return Yoso(sizes["hashes"], sizes["hash_bits"], head_dim)
        case "transnormer":
            return GroupSoftmax() if layer < sizes["diagonal_layers"] else TransNormer(head_dim)
        case "linformer":
            return Linformer(sizes["group_size"], sizes["rank"])
        case "softmax" if sizes.get("window") is not None:
            return SlidingSoftmax(sizes["window"], conventions.scale, sizes.get("sinks", 0))
        case "softmax" | "square":
            return FullAttention(options.base, conventions.scale, by_length=conventions.softmax_scale == "length")
    raise ValueError(f"attention '{sizes['name']}' is unknown")


def build_factor(options: AttentionOptions) -> nn.Parameter | None:
    """The learnt factor `[1]` of the attention beside a local branch, if it has one."""
    return nn.Parameter(torch.full((1,), float(options.sizes["initial_alpha"]))) if options.factor else None


def build_window(options: AttentionOptions, value_dim: int, *, heads: int, kv_heads: int) -> WindowedMemory | None:
    """The window before the attention's memory, and its decay, if it has either.

    Args:
        options: name and sizes.
        value_dim: size E of values.
        heads: query heads H.
        kv_heads: key/value heads K.
    """
    decay = options.sizes.get("decay", "none")
    if not options.window and decay == "none":
        return None
    grouped = options.local or options.base == "flash_global"
    window = Window.of(options.sizes, windowed=options.window, grouped=grouped)
    branches = {"softmax": options.window, "decay": decay, "scale": options.conventions.scale}
    return WindowedMemory(window, heads, kv_heads, value_dim, **branches)


def build_convolution(options: AttentionOptions, heads: int) -> "CausalConvolution | None":
    """The convolution, if there is one."""
    return CausalConvolution(heads, options.sizes["kernel_size"]) if options.convolution else None


class CausalConvolution(nn.Module):
    """One filter per head, over time, on the values: the half of a centred kernel that looks back.

    Args:
        heads: query heads H.
        kernel_size: odd size of the kernel.
    """

    def __init__(self, heads: int, kernel_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, 1, kernel_size, 1))

    def initial_values(self) -> dict[str, Tensor]:
        """Zeros: a converted model starts as it was."""
        return {"weight": torch.zeros(self.weight.shape)}

    def forward(self, values: Tensor, rows: Rows, state: State) -> tuple[Tensor, State]:
        """Filtered values `[B, T, H, E]`; the state is the last values, as many as the kernel looks back."""
        batch, _, kv_heads, size = values.shape
        heads, _, kernel_size, _ = self.weight.shape
        back = kernel_size // 2
        before = state["values"] if state else values.new_zeros(batch, back, kv_heads, size)
        seen = torch.cat([before, values], dim=1)
        signals = wide(seen).repeat_interleave(heads // kv_heads, dim=2).permute(0, 3, 2, 1).flatten(0, 1)
        filtered = nn.functional.conv1d(signals, wide(self.weight)[:, :, : back + 1, 0], groups=heads)
        last = rows.count[:, None] + torch.arange(back, device=values.device)
        after = {"values": seen.take_along_dim(last[:, :, None, None], dim=1)}
        return filtered.unflatten(0, (batch, size)).permute(0, 3, 2, 1), after


class Mixer(NamedTuple):
    """What a layer mixes tokens with: options, what was built by them, and relative biases, if there are any.

    Queries and keys that come before rotary positions have turned them come with these, as `turn`.
    """

    options: AttentionOptions
    attention: nn.Module | None
    factor: Tensor | None
    convolution: CausalConvolution | None
    windowed: WindowedMemory | None
    bias: Bias | None = None
    turn: Turn | None = None

    @property
    def local_bias(self) -> Bias | None:
        """Biases of the local branch."""
        return None if self.options.base in WRAPPED else self.bias


def mix_tokens(
    mixer: Mixer, queries: Tensor, keys: Tensor, values: Tensor, rows: Rows, state: State | None
) -> tuple[Tensor, State | None]:
    """Outputs `[B, T, H, E]` of whole rows, and the state after them if one was given.

    Args:
        mixer: what mixes.
        queries: `[B, T, H, D]`, H a multiple of K.
        keys: `[B, T, K, D]`.
        values: `[B, T, K, E]`.
        rows: where the tokens stand.
        state: what came before; None is nothing.
    """
    if rows.mixers is not None:
        rows.mixers.append(partial(mix_tokens, mixer, queries, keys, values))
    # Sums over a text are taken in float32 or better, whatever the type of the activations.
    with torch.autocast(queries.device.type, enabled=False):
        queries = wide(queries).unflatten(2, (keys.shape[2], -1))
        summed = mixer.options.branch_values(values)
        if mixer.windowed is not None:
            mixed, after = _mix_windowed(mixer, queries, keys, values, rows, state or {})
        elif state is None and isinstance(mixer.attention, Yoso):
            expected = _scaled(mixer.attention.expected(queries, wide(keys), wide(values)), mixer.factor)
            mixed, after = _mix_pieces(mixer._replace(attention=None), queries, keys, values, rows, {})
            mixed = mixed + expected
        else:
            mixed, after = _mix_pieces(mixer, queries, keys, summed, rows, state or {})
        mixed = mixer.options.combined(mixed, values).flatten(2, 3)
        if mixer.convolution is not None:
            filtered, after["convolution"] = mixer.convolution(values, rows, (state or {}).get("convolution", {}))
            mixed = mixed + filtered
    return mixed.to(values.dtype), None if state is None else after


def _mix_pieces(
    mixer: Mixer, queries: Tensor, keys: Tensor, values: Tensor, rows: Rows, state: State
) -> tuple[Tensor, State]:
    """The attention and the local branch, added, `[B, T, K, R, E]`; and their state after these rows."""
    size, outputs = mixer.options.sizes["group_size"], []
    local, bias = mixer.options.local_branch(queries.shape[-1]), mixer.bias
    group = state.get("group") or empty_group(keys, values, size)
    memory = state.get("attention")
    if memory is None and mixer.attention is not None:
        memory = mixer.attention.empty_state(keys, values)
    for begin in range(0, keys.shape[1], size):
        part = slice(begin, begin + size)
        piece = Piece.of(keys[:, part], values[:, part], rows.piece(begin, size), size, group, bias)
        group, asking = piece.unfinished_group, queries[:, part]
        mixed = asking.new_zeros(*asking.shape[:-1], values.shape[-1])
        if local is not None:
            mixed = mixed + local.outputs(asking, replace(piece, bias=mixer.local_bias))
        if mixer.attention is not None:
            base, memory = mixer.attention(asking, piece, memory)
            mixed = mixed + _scaled(base, mixer.factor)
        outputs.append(mixed)
    return torch.cat(outputs, dim=1), {"group": group, "attention": memory}


def _mix_windowed(
    mixer: Mixer, queries: Tensor, keys: Tensor, values: Tensor, rows: Rows, state: State
) -> tuple[Tensor, State]:
    """The same of an attention whose memory has a window before it, or decays."""
    near = {"local": mixer.options.local_branch(queries.shape[-1]), "factor": mixer.factor, "bias": mixer.bias}
    near["turn"] = mixer.turn
    state, inputs = state.get("windowed", {}), (queries, keys, values)
    mixed, after = mixer.windowed(mixer.attention, inputs, rows, state, **near)
    return mixed, {"windowed": after}


def _scaled(outputs: Tensor, factor: Tensor | None) -> Tensor:
    return outputs if factor is None else factor.to(outputs.dtype) * outputs
