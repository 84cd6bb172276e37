"""Softmax attention: by cuDNN's FlashAttention, which writes no matrix of pairs, or in plain XLA."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lin_jax.attention.pairs import merge_heads, pair_scores, split_heads, weighted_values
from pallas_kernels.implementations import choose, target_platform

# What cuDNN takes on every GPU that has FlashAttention at all.
CUDNN_TYPES = ("bfloat16", "float16")
CUDNN_HEAD = 128


def causal_softmax(
    queries: Float[Array, "B T H D"],
    keys: Float[Array, "B T K D"],
    values: Float[Array, "B T K E"],
    scale: float,
    implementation: str | None = None,
) -> Float[Array, "B T H E"]:
    """Outputs of whole rows, each one document from position 0; H is a multiple of K.

    Args:
        queries: `[B, T, H, D]`.
        keys: `[B, T, K, D]`.
        values: `[B, T, K, E]`.
        scale: what scores are multiplied with.
        implementation: `xla` for plain XLA; anything else takes cuDNN where there is a GPU, and XLA for what it cannot.
    """
    asked = ("cudnn", "xla") if implementation != "xla" and target_platform() == "gpu" else "xla"
    if choose("softmax attention", asked, {"cudnn": _obstacle(keys, values), "xla": None}) == "xla":
        mask = jnp.tri(keys.shape[1], dtype=bool)[None]
        return masked_softmax(queries, keys, values, mask, None, scale)
    return jax.nn.dot_product_attention(queries, keys, values, scale=scale, is_causal=True, implementation="cudnn")


def _obstacle(keys: Float[Array, "B T K D"], values: Float[Array, "B T K E"]) -> str | None:
    """Why cuDNN cannot take such rows."""
    length, size = keys.shape[1], keys.shape[3]
    if keys.dtype.name not in CUDNN_TYPES or values.dtype != keys.dtype:
        return f"keys are {keys.dtype} and values {values.dtype}, not {' or '.join(CUDNN_TYPES)}"
    if values.shape[3] != size or size % 8 or size > CUDNN_HEAD:
        return f"heads of {size} and {values.shape[3]} are not a multiple of 8 up to {CUDNN_HEAD}, the same for both"
    return f"rows of {length} tokens are of an odd length" if length % 2 else None


def masked_softmax(
    queries: Float[Array, "B T H D"],
    keys: Float[Array, "B S K D"],
    values: Float[Array, "B S K E"],
    mask: Bool[Array, "#B T S"],
    bias: Float[Array, "#B H T S"] | None,
    scale: float,
) -> Float[Array, "B T H E"]:
    """Outputs over the pairs that a mask allows, in plain XLA."""
    if queries.dtype != jnp.float64 and values.shape[-1] == keys.shape[-1]:
        return jax.nn.dot_product_attention(queries, keys, values, bias, mask[:, None], scale=scale)
    # JAX's own function takes the softmax in float32 whatever it is given, and has one size for keys and values.
    scores = pair_scores(split_heads(queries, keys.shape[2]), keys) * scale
    if bias is not None:
        scores = scores + bias.reshape(bias.shape[0], *scores.shape[1:])
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)
    return merge_heads(weighted_values(jax.nn.softmax(scores), values)).astype(values.dtype)
