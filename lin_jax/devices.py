"""Devices that JAX runs on, by name."""

import os

import jax

from lin_jax.errors import UserError


def device_kind() -> str:
    """Kind of device that JAX runs on; for a CPU with its number of processors.

    Raises:
        UserError: JAX cannot use the platform that the environment asks for.
    """
    device = _devices()[0]
    if device.platform == "cpu":
        return f"cpu, {len(os.sched_getaffinity(0))} processors"
    return device.device_kind


def devices_shown() -> str:
    """All devices in a phrase, such as `4 x NVIDIA H100`; errors as in `device_kind`."""
    count = len(_devices())
    return device_kind() if count == 1 else f"{count} x {device_kind()}"


def _devices() -> list[jax.Device]:
    try:
        return jax.devices()
    # A plugin that fails to load raises what it likes, assertions included.
    except (RuntimeError, AssertionError, ImportError) as error:
        asked = getattr(jax.config, "jax_platforms", None) or "the default"
        reason = next(iter(str(error).strip().splitlines()), "it finds no device")[:200].rstrip(". ")
        raise UserError(
            f"JAX cannot use the platform {asked} here ({reason}); install JAX for it, or unset JAX_PLATFORMS"
        ) from None
