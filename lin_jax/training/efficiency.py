"""How much of the devices' arithmetic a run uses: model FLOPs utilisation, MFU (Chowdhery et al. 2022, PaLM)."""

import math
from typing import Any

import jax

from lin_jax.evaluation.flops import attention_flops, peak_flops
from lin_jax.models import Gpt2Config, LlamaConfig
from lin_jax.training.parameters import Params


def matrix_flops(params: Params, frozen: Params, tokens: int) -> float:
    """Operations of the matrices in a step: per token 2 a weight forward, and 4 more backward where it learns.

    What attention adds between tokens is for `mixing_flops`; what is computed twice to save memory does not count.
    """
    return tokens * (6.0 * _weights(params) + 2.0 * _weights(frozen))


def mixing_flops(model: Any, rows: int, length: int) -> float:
    """Operations of attention between its projections in a step, forward and backward, where they can be counted.

    Args:
        model: configuration of the model; zero for families without one attention of many heads in every layer.
        rows: of the step.
        length: tokens of a row.
    """
    if not isinstance(model, LlamaConfig | Gpt2Config):
        return 0.0
    kv_heads = getattr(model, "kv_heads", model.num_heads)
    layer = attention_flops(model.attention, model.num_heads, kv_heads, model.head_size, length)
    return 3.0 * rows * model.num_layers * layer


def _weights(params: Params) -> int:
    """Numbers in matrices; an embedding is looked up, not multiplied."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return sum(
        math.prod(leaf.shape)
        for path, leaf in leaves
        if len(leaf.shape) > 1 and "embedding" not in jax.tree_util.keystr(path)
    )


def utilisation(flops: float, seconds: float) -> float | None:
    """Share of the peak of all devices that so many operations in so many seconds are; None if it is not known."""
    peak = peak_flops(jax.devices()[0])
    return None if peak is None else flops / (seconds * peak * jax.device_count())
