"""Int8 weights of files as they are into the matrices of a model that decodes."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from lin_jax.hub.int8.tensor import RoundedTensor
from lin_jax.hub.tensors import Entries, same
from lin_jax.models.products import StoredMatrix
from lin_jax.models.stored_weights import StoredEmbedding, module_at


def fill_rounded(
    model: Any, entries: Entries, tensors: Mapping[str, Any], note: Callable[[int], Any] = lambda size: None
) -> Entries:
    """Fills the stored matrices whose tensors are int8; returns the entries of all other tensors.

    Args:
        model: the model, abstract, its matrices stored for decoding.
        entries: its entries, as `decoding_entries` has them.
        tensors: tensors by name, which are known to fit.
        note: called with the bytes of every tensor that was read.
    """
    left = {}
    for name, entry in entries.items():
        tensor, holder = tensors[name], module_at(model, entry.path[:-1])
        if not isinstance(tensor, RoundedTensor) or not isinstance(holder, StoredMatrix | StoredEmbedding):
            left[name] = entry
            continue
        # What lies in the file as it does here is taken from its pages.
        integers = tensor.weight.mapped() if entry.read is same else entry.read(np.asarray(tensor.weight))
        weight = jax.device_put(np.ascontiguousarray(integers)).block_until_ready()
        holder.set_rounded(weight, jax.device_put(tensor.factors.reshape(-1)))
        note(tensor.nbytes)
        tensor.weight.release()
    return left
