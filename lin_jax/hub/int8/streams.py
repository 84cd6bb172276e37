"""Tensors on their way into a folder with int8 weights, rounded a block at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from lin_jax.hub.conversion.blocks import blocks_of
from lin_jax.hub.conversion.tensor_file import StreamedTensor
from lin_jax.hub.int8.matrices import is_feature_map
from lin_jax.hub.int8.tensor import SCALE, RoundedTensor
from lin_jax.models.products import quantized

Parts = tuple[np.ndarray, np.ndarray]


def rounded_streams(
    tensors: Mapping[str, StreamedTensor], axes: Mapping[str, int], kept: Mapping[str, Any]
) -> dict[str, StreamedTensor]:
    """The tensors as a folder with int8 weights holds them: of a matrix its integers and, by `NAME_scale`, factors.

    Matrices of learnt feature maps are bfloat16 there: int8 would need factors for each of their heads and features.
    Integers and factors are made one after the other, so a matrix is read twice.

    Args:
        tensors: by name.
        axes: axis of the outputs of each matrix to round, by name.
        kept: tensors that are int8 where they come from, and are written as they are.
    """
    found = {}
    for name, tensor in tensors.items():
        if name not in axes:
            found[name] = _narrowed(tensor) if is_feature_map(name) else tensor
            continue
        parts: tuple[Callable[[], Iterable[np.ndarray]], ...]
        if isinstance(kept.get(name), RoundedTensor):
            parts = (partial(blocks_of, kept[name].weight), partial(_factors, kept[name]))
        else:
            parts = (partial(_part, 0, tensor, axes[name]), partial(_part, 1, tensor, axes[name]))
        outputs = tensor.shape[axes[name]]
        scale = (outputs, 1) if axes[name] == 0 else (1, outputs)
        found[name] = StreamedTensor(tensor.shape, np.dtype(np.int8), parts[0])
        found[name + SCALE] = StreamedTensor(scale, np.dtype(np.float32), parts[1])
    return found


def _narrowed(tensor: StreamedTensor) -> StreamedTensor:
    """The tensor in bfloat16, if its numbers are wider."""
    narrow = np.dtype(ml_dtypes.bfloat16)
    if tensor.dtype.itemsize <= narrow.itemsize:
        return tensor
    return StreamedTensor(tensor.shape, narrow, lambda: (block.astype(narrow) for block in tensor.blocks()))


def _factors(tensor: RoundedTensor) -> Iterator[np.ndarray]:
    yield tensor.factors


def _part(which: int, tensor: StreamedTensor, axis: int) -> Iterator[np.ndarray]:
    """The integers or the factors of a tensor `[A, B]`."""
    for parts in _by_rows(tensor) if axis == 0 else _by_columns(tensor):
        yield parts[which]


def _by_rows(tensor: StreamedTensor) -> Iterator[Parts]:
    for block in tensor.blocks():
        weight, scale = quantized(jnp.asarray(block.reshape(-1, tensor.shape[1])))
        yield np.asarray(weight), np.asarray(scale)


def _by_columns(tensor: StreamedTensor) -> Iterator[Parts]:
    """Of outputs in columns, each of which goes through all blocks, the whole tensor at once."""
    parts = [block.reshape(-1) for block in tensor.blocks()]
    weight, scale = quantized(jnp.asarray(np.concatenate(parts).reshape(tensor.shape).T))
    yield np.ascontiguousarray(np.asarray(weight).T), np.asarray(scale)
