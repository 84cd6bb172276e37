"""Tensors in blocks of their numbers: what is larger than memory is read, compared and copied all the same."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from lin_jax.hub.files import LazyTensor
from lin_jax.hub.int8.tensor import RoundedTensor, products

# Numbers that are read, converted and written at once.
BLOCK = 1 << 22


def blocks_of(tensor: Any, row: int = 1) -> Iterator[np.ndarray]:
    """The numbers of a tensor in memory's order, a block `[N]` at a time.

    Args:
        tensor: an array, or a tensor in a file.
        row: N is a multiple of it, for tensors whose last axis is as long.
    """
    if isinstance(tensor, LazyTensor):
        yield from _of_file(tensor, max(BLOCK // row, 1) * row)
        return
    if isinstance(tensor, RoundedTensor):
        yield from _products(tensor)
        return
    array = np.atleast_1d(np.asarray(tensor))
    rows = max(1, BLOCK * len(array) // max(array.size, 1))
    for begin in range(0, len(array), rows):
        yield np.ascontiguousarray(array[begin : begin + rows]).reshape(-1)


def whole(tensor: Any) -> np.ndarray:
    """All numbers of a tensor, in its shape."""
    if not isinstance(tensor, LazyTensor):
        return np.asarray(tensor)
    found = list(_of_file(tensor, max(1, tensor.nbytes)))
    return (found[0] if found else np.empty(0, tensor.dtype)).reshape(tensor.shape)


def equal(first: Any, second: Any) -> bool:
    """True if two tensors hold the same numbers; neither is in memory as a whole."""
    if tuple(first.shape) != tuple(second.shape) or first.dtype != second.dtype:
        return False
    return all(np.array_equal(one, other) for one, other in zip(blocks_of(first), blocks_of(second), strict=True))


def _products(tensor: RoundedTensor) -> Iterator[np.ndarray]:
    """Blocks of whole rows of what int8 numbers and their factors stand for."""
    width, place, factors = tensor.shape[1], 0, tensor.factors
    for block in blocks_of(tensor.weight, width):
        rows = block.reshape(-1, width)
        scale = factors if len(factors) == 1 else factors[place : place + len(rows)]
        place += len(rows)
        yield products(rows, scale).reshape(-1)


def _of_file(tensor: LazyTensor, most: int) -> Iterator[np.ndarray]:
    """Blocks that are read: pages of a mapped file would count as this process's memory."""
    left = tensor.nbytes // tensor.dtype.itemsize
    if not left:
        return
    with tensor.pages.path.open("rb") as file:
        file.seek(tensor.pages.begins[tensor.name])
        while left:
            block = np.empty(min(left, most), tensor.dtype)
            if file.readinto(block.view(np.uint8).data) != block.nbytes:
                raise OSError(f"{tensor.pages.path} ended while it was read")
            left -= block.size
            yield block
