"""Token mixers by name."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from lin_jax.attention.augmented import AugmentedAttention
from lin_jax.attention.local import LOCAL_SCORES
from lin_jax.attention.mixer import AttentionConfig, TokenMixer
from lin_jax.attention.softmax import SoftmaxAttention
from lin_jax.errors import UserError

Builder = Callable[[AttentionConfig, int, int, int, Any], TokenMixer]


def _augmented(*, local: bool, grouped: bool, convolution: bool) -> Builder:
    """A builder of the composition with the given branches."""

    def build(
        config: AttentionConfig, heads: int, kv_heads: int, head_dim: int, param_dtype: Any
    ) -> AugmentedAttention:
        if config.local_score not in LOCAL_SCORES:
            raise UserError(
                f"attention.local_score '{config.local_score}' is unknown; choose one of {', '.join(LOCAL_SCORES)}"
            )
        return AugmentedAttention(
            heads,
            kv_heads,
            head_dim,
            group_size=config.group_size,
            local=LOCAL_SCORES[config.local_score] if local else None,
            grouped=grouped,
            kernel_size=config.kernel_size if convolution else None,
            initial_alpha=config.initial_alpha,
            param_dtype=param_dtype,
        )

    return build


def _softmax(config: AttentionConfig, heads: int, kv_heads: int, head_dim: int, param_dtype: Any) -> SoftmaxAttention:
    return SoftmaxAttention(kv_heads, head_dim)


REGISTRY: dict[str, Builder] = {
    "augmented": _augmented(local=True, grouped=True, convolution=True),
    "grouped": _augmented(local=False, grouped=True, convolution=False),
    "grouped_convolution": _augmented(local=False, grouped=True, convolution=True),
    "local": _augmented(local=True, grouped=False, convolution=False),
    "local_convolution": _augmented(local=True, grouped=False, convolution=True),
    "local_grouped": _augmented(local=True, grouped=True, convolution=False),
    "softmax": _softmax,
}


def build_mixer(
    config: AttentionConfig, *, heads: int, kv_heads: int, head_dim: int, param_dtype: Any = jnp.float32
) -> TokenMixer:
    """The token mixer that a configuration names.

    Raises:
        UserError: no mixer or score function has the configured name.
    """
    if config.name not in REGISTRY:
        raise UserError(f"attention.name '{config.name}' is unknown; choose one of {', '.join(sorted(REGISTRY))}")
    return REGISTRY[config.name](config, heads, kv_heads, head_dim, param_dtype)
