"""How much of the devices' arithmetic a run uses: model FLOPs utilisation, MFU (Chowdhery et al. 2022, PaLM)."""

import math
from collections.abc import Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from lin_jax.training.parameters import Params

# Dense bfloat16 operations a second of one device as JAX counts devices, from the manufacturers' data sheets. The
# longer of two names that fit is meant.
_PEAKS: Mapping[str, float] = {
    "TPU v4": 275e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device: Any) -> float | None:
    """Operations a second that a device can do in bfloat16; None if that is not known, as for a CPU."""
    names = [name for name in _PEAKS if device.device_kind.startswith(name)]
    return _PEAKS[max(names, key=len)] if names else None


def matrix_flops(params: Params, frozen: Params, tokens: int) -> float:
    """Operations of the matrices in a step: per token 2 a weight forward, and 4 more backward where it learns.

    What attention adds between tokens is not counted, nor what is computed twice to save memory.
    """
    return tokens * (6.0 * _weights(params) + 2.0 * _weights(frozen))


def _weights(params: Params) -> int:
    """Numbers in matrices; an embedding is looked up, not multiplied."""
    flat = flatten_dict(params)
    return sum(math.prod(leaf.shape) for path, leaf in flat.items() if len(leaf.shape) > 1 and path[-1] != "embedding")


def utilisation(flops: float, seconds: float) -> float | None:
    """Share of the peak of all devices that so many operations in so many seconds are; None if it is not known."""
    peak = peak_flops(jax.devices()[0])
    return None if peak is None else flops / (seconds * peak * jax.device_count())
