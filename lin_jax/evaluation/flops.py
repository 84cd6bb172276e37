"""Floating-point operations that a model's mathematics needs, and what a device can do: what a share of its peak is of.

Only products count, two operations a multiplication with its addition, and only those that are necessary: causal
softmax takes the half of its pairs that are not masked away, augmented attention the pairs within groups, one product
into the memory and one out of it for each token, and the taps of its convolution. Norms, activations, feature maps,
hashes and whatever an implementation does beyond that (recomputation in the backward pass, masked pairs, pairs of a
kernel's tiles) earn nothing. A backward pass takes twice its forward pass.
"""

import jax

from lin_jax.attention import AttentionConfig
from lin_jax.attention.registry import parse_name
from lin_jax.models import LlamaConfig

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


def peak_flops(device: jax.Device | None = None) -> float | None:
    """Operations per second that a device's data sheet promises for products of bfloat16; None if it is not known.

    Args:
        device: None for the first one at hand.
    """
    kind = (device or jax.devices()[0]).device_kind
    return next((peak for name, peak in PEAKS.items() if kind.startswith(name)), None)


def step_flops(config: LlamaConfig, batch: int, length: int) -> float:
    """Operations of one training step, forward and backward, over `batch` rows of `length` predicted tokens each.

    `3 (2 N + 2 E V + A)` a token: N weights of the blocks' linear layers, E V those of the head, A attention's own.
    """
    return 3 * batch * forward_flops(config, length)


def forward_flops(config: LlamaConfig, length: int) -> float:
    """Operations of a forward pass over one row of `length` tokens, logits included."""
    assert config.vocab_size is not None, "filled in when a run begins"
    width, inner, inner_kv = config.hidden_size, config.num_heads * config.head_size, config.kv_heads * config.head_size
    weights = width * (2 * inner + 2 * inner_kv) + 3 * width * config.intermediate_size
    products = 2 * length * (config.num_layers * weights + width * config.vocab_size)
    mixed = attention_flops(config.attention, config.num_heads, config.kv_heads, config.head_size, length)
    return products + config.num_layers * mixed


def attention_flops(config: AttentionConfig, heads: int, kv_heads: int, size: int, length: int) -> float:
    """Operations of one layer's attention over a row, between its projections.

    Args:
        config: which attention.
        heads: query heads H.
        kv_heads: key/value heads K.
        size: of a head, D.
        length: tokens T of the row.
    """
    name = parse_name(config.name)
    whole, rest = divmod(length, config.group_size)
    in_groups = whole * _pairs(config.group_size) + _pairs(rest)
    pairs = {"softmax": _pairs(length), "square": _pairs(length)}.get(name.base, 0)
    if name.local or name.base in ("flash", "flash_local", "linear_angular", "transnormer"):
        pairs += in_groups
    if name.base == "linformer":
        pairs += in_groups + config.rank * config.group_size * _pairs(whole)
    total = 4.0 * heads * size * pairs
    if (features := _features(config, name.base, size)) is not None:
        total += 2.0 * (heads + kv_heads) * length * features * size
    if name.convolution:
        # The causal half of the kernel, the token itself included.
        total += 2.0 * heads * length * size * (config.kernel_size + 1) / 2
    return total


def _pairs(length: int) -> int:
    """Causal pairs of a row."""
    return length * (length + 1) // 2


def _features(config: AttentionConfig, base: str, size: int) -> int | None:
    """Rows of the memory that an attention keeps of each head; None if it keeps none."""
    if base in ("softmax", "square", "flash_local", "linformer"):
        return None
    random = config.features or 2 * size
    return {"performer": random, "rfa": random, "yoso": config.hashes * 2**config.hash_bits}.get(base, size)
