"""Floating-point operations that a model's mathematics needs, and the peaks of devices: model FLOPs utilisation.

Only products count, two operations a multiplication with its addition, and only those that are necessary: causal
softmax takes the half of its pairs that are not masked away, augmented attention the pairs within groups, one product
into the memory and one out of it for each token, and the taps of its convolution; a window takes the pairs in it, a
learnt feature map its matrices. Norms, activations, random features, hashes and whatever an implementation does beyond
that (recomputation in the backward pass, masked pairs, pairs of a kernel's tiles) earn nothing. A backward pass takes
twice its forward pass.
"""

import math
from typing import Any

import jax

from lin_jax.attention import AttentionConfig
from lin_jax.attention.registry import parse_name
from lin_jax.models import Gpt2Config, LlamaConfig, ModelConfig
from lin_jax.models.params import Params

# Bfloat16 operations per second without sparsity, from data sheets, by how the device's name in JAX begins; the longer
# of two names comes first.
PEAKS = {
    "NVIDIA A100": 312e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}
# Parameters that are matrices: of linear layers and their low-rank updates, of Medusa's heads, of a path head.
MATRICES = frozenset({"kernel", "lora_a", "lora_b", "weight", "output", "projection", "inner", "outer"})
# What the classifiers of GPT-2 and T5 have in place of a head over the vocabulary.
CLASS_HEADS = frozenset({"score", "dense"})


def peak_flops(device: jax.Device | None = None) -> float | None:
    """Peak operations per second for products of bfloat16, from a device's data sheet; None if it is not known.

    Args:
        device: None for the first one at hand.
    """
    kind = (device or jax.devices()[0]).device_kind
    return next((peak for name, peak in PEAKS.items() if kind.startswith(name)), None)


def step_flops(model: ModelConfig, params: Params, frozen: Params, rows: int, length: int) -> float:
    """Operations of one training step, forward and backward.

    `6 N + 2 F + 3 A` a token: N weights that learn and F that do not, as they are multiplied with tokens, and A what
    attention adds between its projections.

    Args:
        model: configuration of the model.
        params: parameters that learn, arrays or shapes.
        frozen: parameters that do not learn, a teacher's for one; their products are counted forward only.
        rows: of the step.
        length: predicted tokens of a row.
    """
    teaching = 2.0 * length * _weights(model, frozen)
    return rows * (3.0 * forward_flops(model, params, length) + teaching)


def forward_flops(model: ModelConfig, params: Params, length: int) -> float:
    """Operations of a forward pass over one row of `length` tokens, logits included."""
    return 2.0 * length * _weights(model, params) + mixing_flops(model, length)


def mixing_flops(model: ModelConfig, length: int) -> float:
    """Operations of all layers' attention over one row, between its projections.

    Zero for families without one attention of many heads in every layer.
    """
    if not isinstance(model, LlamaConfig | Gpt2Config):
        return 0.0
    kv_heads = getattr(model, "kv_heads", model.num_heads)
    every = model.attention.of_layers(model.num_layers)
    return sum(attention_flops(each, model.num_heads, kv_heads, model.head_size, length) for each in every)


def attention_flops(config: AttentionConfig, heads: int, kv_heads: int, size: int, length: int) -> float:
    """Operations of one layer's attention over a row, between its projections.

    Args:
        config: of the attention.
        heads: query heads H.
        kv_heads: key/value heads K.
        size: of a head, D.
        length: tokens T of the row.
    """
    name = parse_name(config.name)
    whole, rest = divmod(length, config.group_size)
    in_groups = whole * _pairs(config.group_size) + _pairs(rest)
    pairs = _pairs(length) if name.base in ("softmax", "square") else 0
    if name.base == "softmax" and config.window is not None:
        pairs += _sink_pairs(config, length) - _pairs(max(length - config.window, 0))
    if name.local or name.base in ("flash", "flash_local", "linear_angular", "transnormer"):
        pairs += in_groups
    if name.base == "linformer":
        pairs += in_groups + config.rank * config.group_size * _pairs(whole)
    if name.window:
        pairs += _window_pairs(config, length) + _sink_pairs(config, length)
    total = 4.0 * heads * size * pairs
    if (features := _features(config, name.base, size)) is not None:
        total += 2.0 * (heads + kv_heads) * length * features * size
    if (learnt := {"hedgehog": size, "exponential": features, "clustered": features}.get(name.base)) is not None:
        total += 2.0 * (heads + kv_heads) * length * learnt * size
    if config.decay == "token":
        total += 2.0 * kv_heads * length * size
    if name.convolution:
        # The causal half of the kernel, the token itself included.
        total += 2.0 * heads * length * size * (config.kernel_size + 1) / 2
    return total


def _pairs(length: int) -> int:
    """Causal pairs of a row."""
    return length * (length + 1) // 2


def _window_pairs(config: AttentionConfig, length: int) -> int:
    """Pairs of a row in windows: a sliding one, or the query's group as far as the query and the groups before it."""
    if config.window is not None:
        return _pairs(length) - _pairs(max(length - config.window, 0))
    size, groups = config.group_size, range(-(-length // config.group_size))
    sizes = [min(size, length - number * size) for number in groups]
    return sum(
        _pairs(tokens) + tokens * size * min(number, config.window_groups)
        for number, tokens in zip(groups, sizes, strict=True)
    )


def _sink_pairs(config: AttentionConfig, length: int) -> int:
    """Pairs of a row whose key is a sink before the query's window."""
    if config.window is not None:
        beyond = max(length - config.window, 0)
        return _pairs(beyond) - _pairs(max(beyond - config.sinks, 0))
    size = config.group_size
    return sum(
        min(size, length - number * size) * min(config.sinks, max(number - config.window_groups, 0) * size)
        for number in range(-(-length // size))
    )


def _features(config: AttentionConfig, base: str, size: int) -> int | None:
    """Rows of the memory that an attention keeps of each head; None if it keeps none."""
    if base in ("softmax", "square", "flash_local", "linformer"):
        return None
    random = config.features or 2 * size
    sizes = {"performer": random, "rfa": random, "exponential": random, "clustered": random}
    sizes["hedgehog"] = 2 * size
    return sizes.get(base, config.hashes * 2**config.hash_bits if base == "yoso" else size)


def _weights(model: ModelConfig, params: Params) -> int:
    """Numbers in the matrices that every token is multiplied with.

    An embedding is looked up, and multiplied only where it is the head, too. What a mixer has of its own is counted by
    `attention_flops`.
    """
    leaves = {_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    tied = getattr(model, "tie_embeddings", False) and not any(CLASS_HEADS & set(names) for names in leaves)

    def multiplied(names: tuple[str, ...]) -> bool:
        return (names[-1] in MATRICES and "mixer" not in names) or (tied and names[-2:] == ("embed", "embedding"))

    return sum(math.prod(leaf.shape) for names, leaf in leaves.items() if multiplied(names))


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Names on the way to a parameter, in a plain tree or in a module."""
    names = tuple(str(getattr(part, "key", getattr(part, "name", part))) for part in path)
    return names[:-1] if names[-1:] == ("value",) else names


def utilisation(flops: float, seconds: float) -> float | None:
    """Operations in so many seconds as a share of the peak of all devices; None if the peak is not known."""
    peak = peak_flops(jax.devices()[0])
    return None if peak is None else flops / (seconds * peak * jax.device_count())
