"""Matrices of a model with int8 weights: which are int8 (of linear layers, head, table of tokens), which bfloat16."""

import re
from collections.abc import Iterable
from typing import Any

from flax import nnx

from lin_jax.attention.feature_maps import LEARNT_MATRICES
from lin_jax.hub.tensors import Entries, transpose
from lin_jax.models.stored_weights import module_at

_TABLES = (("embed", "embedding"), ("word", "embedding"))
_WEIGHT = ".weight"


def output_axes(model: Any, entries: Entries) -> dict[str, int]:
    """The axis of outputs, 0 or 1, of every tensor that is rounded, by its name.

    Args:
        model: the model, which may be abstract.
        entries: all of its tensors.
    """
    found = {}
    for name, entry in entries.items():
        holder = module_at(model, entry.path[:-1])
        if isinstance(holder, nnx.Linear) and entry.path[-1] == "kernel":
            found[name] = 0 if entry.write is transpose else 1
        elif isinstance(holder, nnx.Embed) and entry.path[-2:] in _TABLES:
            found[name] = 0
    return found


def is_feature_map(name: str) -> bool:
    """True for the name of a tensor that is a matrix of a learnt feature map, in a folder of any family."""
    return name.rpartition(".")[2] in LEARNT_MATRICES


def module_patterns(names: Iterable[str]) -> list[str]:
    """Names of the modules that tensors belong to, each once for all layers, whose number is a star."""
    modules = (name.removesuffix(_WEIGHT) for name in names)
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name, count=1) for name in modules))
