"""The package's verbs, as `lin_jax` hands them over; the other files here are what they share."""

from lin_jax.api.verbs import (
    AttentionConfig,
    compare,
    from_pretrained,
    generate,
    linearize,
    run,
    save_pretrained,
    select_layers,
    train,
)

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
