"""Tensors of an opened checkpoint as they will stand in another folder, made from the file a block at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from lin_jax.hub.conversion.blocks import blocks_of, whole
from lin_jax.hub.conversion.tensor_file import StreamedTensor
from lin_jax.hub.tensors import (
    Entries,
    TensorEntry,
    check_finite,
    copy_into,
    same,
    stored,
    transpose,
    written,
    written_shape,
)


def streams(model: Any, entries: Entries, tensors: Mapping[str, Any]) -> dict[str, StreamedTensor]:
    """The tensors that entries name as a folder of the model holds them, in the entries' order.

    Args:
        model: the model, abstract but for the variables of tensors that are not at hand.
        entries: the variable of every tensor, by the tensor's name.
        tensors: tensors at hand, by name: arrays, or tensors that are yet to be read. All others are the model's own,
            and each of them is copied from the devices when it is written.
    """
    variables, found = stored(model), {}
    for name, entry in entries.items():
        variable = variables[entry.path]
        blocks: Callable[[], Iterable[np.ndarray]] = partial(_of_variable, variable, entry)
        if name in tensors:
            blocks = partial(_of_tensor, name, tensors[name], entry, variable)
        found[name] = StreamedTensor(written_shape(entry, variable), np.dtype(variable.dtype), blocks)
    return found


def _of_variable(variable: Any, entry: TensorEntry) -> Iterator[np.ndarray]:
    yield written(variable, entry)


def _of_tensor(name: str, tensor: Any, entry: TensorEntry, variable: Any) -> Iterator[np.ndarray]:
    """A tensor in its checkpoint form, its numbers rounded as the model would round them."""
    # What is turned on its way into a model is turned back on the way out.
    if entry.read is entry.write and entry.read in (same, transpose):
        for block in blocks_of(tensor):
            converted = block.astype(variable.dtype, copy=False)
            check_finite(name, converted)
            yield converted
        return
    part = np.empty(variable.shape if entry.layer is None else variable.shape[1:], variable.dtype)
    copy_into(part, entry.read(whole(tensor)))
    check_finite(name, part)
    yield entry.write(part)
