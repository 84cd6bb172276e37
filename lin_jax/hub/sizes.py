"""Sizes of a model, its context and its decode state."""

import math
from typing import Any

import jax
import numpy as np
from flax import nnx

from lin_jax.errors import UserError
from lin_jax.models.causal import CausalModel


def parameter_count(model: nnx.Module) -> int:
    """Number of trainable parameters of a model, which may be abstract."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def context_length(config: Any) -> int | None:
    """Tokens of the longest text that a model was made for; None if its configuration has no such number."""
    rotary, bound = getattr(config, "rotary", None), getattr(config, "max_positions", None)
    if rotary is None or bound is not None:
        return bound
    return rotary.context_length or rotary.original_context_length


def state_bytes(model: nnx.Module, length: int) -> int | None:
    """Bytes of the decode state of one sequence of at most `length` tokens; None for models that do not decode."""
    if not isinstance(model, CausalModel):
        return None
    graph, state = nnx.split(model)
    try:
        shapes = jax.eval_shape(lambda state: nnx.merge(graph, state).init_state(1, length), state)
    except UserError:  # scores that are divided by the length of the row have no state
        return None
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(shapes))
