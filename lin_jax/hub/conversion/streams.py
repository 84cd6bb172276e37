"""Tensors of an opened checkpoint as they will stand in another folder, made from the file a block at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class KernelUpdate:
    """The update `scale A B` that an adapter adds to a kernel `[I, O]`.

    Attributes:
        scale: factor of the update.
        down: A, `[L, I, r]` of a stack of layers, or `[I, r]`; in float64.
        up: B, `[L, r, O]`, or `[r, O]`.
    """

    scale: float
    down: np.ndarray
    up: np.ndarray

    def of_layer(self, layer: int | None) -> "KernelUpdate":
        """The update of one layer of a stack; None is no stack."""
        return self if layer is None else KernelUpdate(self.scale, self.down[layer], self.up[layer])


def streams(
    model: Any,
    entries: Entries,
    tensors: Mapping[str, Any],
    updates: Mapping[tuple[Any, ...], KernelUpdate] | None = None,
) -> dict[str, StreamedTensor]:
    """The tensors that entries name as a folder of the model holds them, in the entries' order.

    Args:
        model: the model, abstract but for the variables of tensors that are not at hand.
        entries: the variable of every tensor, by the tensor's name.
        tensors: tensors at hand, by name: arrays, or tensors that are yet to be read. All others are the model's own,
            and each of them is copied from the devices when it is written.
        updates: what adapters add to tensors at hand, by the paths of their variables.
    """
    updates = updates or {}
    variables, found = stored(model), {}
    for name, entry in entries.items():
        variable = variables[entry.path]
        blocks: Callable[[], Iterable[np.ndarray]] = partial(_of_variable, variable, entry)
        if name in tensors:
            blocks = partial(_of_tensor, name, tensors[name], entry, variable)
            if entry.path in updates:
                blocks = partial(_updated, blocks, updates[entry.path].of_layer(entry.layer), entry)
        found[name] = StreamedTensor(written_shape(entry, variable), np.dtype(variable.dtype), blocks)
    return found


def _of_variable(variable: Any, entry: TensorEntry) -> Iterator[np.ndarray]:
    yield written(variable, entry)


def _updated(
    blocks: Callable[[], Iterable[np.ndarray]], update: KernelUpdate, entry: TensorEntry
) -> Iterator[np.ndarray]:
    """The blocks of a kernel, or of a transposed one, with an adapter's update added as `LowRankLinear` adds it."""
    down, up = update.down, update.up
    rows, columns = (up.T, down.T) if entry.write is transpose else (down, up)
    place = 0
    for block in blocks():
        exact = block.reshape(-1, columns.shape[1]).astype(np.float64)
        part = rows[place : place + len(exact)]
        place += len(exact)
        for rank in range(columns.shape[0]):
            # The factor is part of the first matrix there, and so are roundings.
            one, other = part[:, rank, None], columns[rank]
            exact += one * (update.scale * other) if entry.write is transpose else update.scale * one * other
        yield exact.astype(block.dtype).reshape(-1)


def _of_tensor(name: str, tensor: Any, entry: TensorEntry, variable: Any) -> Iterator[np.ndarray]:
    """A tensor in its checkpoint form, its numbers rounded as the model would round them."""
    # What is turned on its way into a model is turned back on the way out.
    if entry.read is entry.write and entry.read in (same, transpose):
        for block in blocks_of(tensor, tensor.shape[-1] if tensor.shape else 1):
            converted = block.astype(variable.dtype, copy=False)
            check_finite(name, converted)
            yield converted
        return
    part = np.empty(variable.shape if entry.layer is None else variable.shape[1:], variable.dtype)
    copy_into(part, entry.read(whole(tensor)))
    check_finite(name, part)
    yield entry.write(part)
