"""Linearized language models in JAX, decoded with lossless tree speculation on a constant-size state."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lin_jax.api import AttentionConfig as AttentionConfig
    from lin_jax.api import compare as compare
    from lin_jax.api import from_pretrained as from_pretrained
    from lin_jax.api import generate as generate
    from lin_jax.api import linearize as linearize
    from lin_jax.api import run as run
    from lin_jax.api import save_pretrained as save_pretrained
    from lin_jax.api import select_layers as select_layers
    from lin_jax.api import train as train

__version__ = "0.1.0"
__all__ = [
    "AttentionConfig",
    "compare",
    "from_pretrained",
    "generate",
    "linearize",
    "run",
    "save_pretrained",
    "select_layers",
    "train",
]


def __getattr__(name: str) -> Any:
    """Imports the verbs when one is first used: importing the package is as quick as importing JAX."""
    if name not in __all__:
        raise AttributeError(f"module 'lin_jax' has no attribute '{name}'")
    from lin_jax import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
