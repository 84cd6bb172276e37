"""Named tensors of a checkpoint, and where each of them lives in a model.

Convolutions are stored as `[H, 1, K, 1]`, a centred kernel in which tap j sees `v[t + j - K // 2]`; of a masked one only
the half that looks back is read. The factor of the grouped branch is stored as `[1]`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lin_jax.errors import UserError


def same(array: np.ndarray) -> np.ndarray:
    """The array itself."""
    return array


def transpose(array: np.ndarray) -> np.ndarray:
    """The array with its axes reversed."""
    return array.T


def taps(kernel: np.ndarray) -> np.ndarray:
    """Taps `[H, W]`, lag 0 first, of the half that looks back of a centred kernel `[H, 1, K, 1]`."""
    return kernel[:, 0, kernel.shape[2] // 2 :: -1, 0]


def masked_kernel(taps: np.ndarray) -> np.ndarray:
    """The centred kernel `[H, 1, 2W-1, 1]` with its future half zero."""
    heads, width = taps.shape
    kernel = np.zeros((heads, 1, 2 * width - 1, 1), taps.dtype)
    kernel[:, 0, :width, 0] = taps[:, ::-1]
    return kernel


def centred_taps(kernel: np.ndarray) -> np.ndarray:
    """Taps `[H, K]`, the most negative lag first, of a centred kernel `[H, 1, K, 1]`."""
    return kernel[:, 0, ::-1, 0]


def centred_kernel(taps: np.ndarray) -> np.ndarray:
    """The centred kernel `[H, 1, K, 1]` of all taps."""
    return taps[:, None, ::-1, None]


@dataclass(frozen=True)
class Entry:
    """Where a tensor lives in the model, and how it is turned on the way in and out.

    Attributes:
        path: of the parameter.
        read: from the checkpoint's shape to the model's.
        write: back.
        layer: which layer of a stacked parameter; None for a parameter that is not stacked.
    """

    path: tuple[str, ...]
    read: Callable[[np.ndarray], np.ndarray] = same
    write: Callable[[np.ndarray], np.ndarray] = same
    layer: int | None = None

    def of_layer(self, stack: tuple[str, ...], layer: int) -> "Entry":
        """The same tensor of one layer of a stack."""
        return replace(self, path=(*stack, *self.path), layer=layer)


def kernel(*path: str) -> Entry:
    """The weight `[out, in]` of a linear layer."""
    return Entry((*path, "kernel"), transpose, transpose)


def convolution(*path: str, centred: bool = False) -> Entry:
    """The kernel of a convolution."""
    turn = (centred_taps, centred_kernel) if centred else (taps, masked_kernel)
    return Entry((*path, "taps"), *turn)


Entries = dict[str, Entry]


def stacked(prefix: str, layer_entries: Mapping[str, Entry], stack: tuple[str, ...], count: int) -> Entries:
    """Entries of all layers of a stack: `prefix.LAYER.name` for each name."""
    return {
        f"{prefix}.{layer}.{name}": entry.of_layer(stack, layer)
        for layer in range(count)
        for name, entry in layer_entries.items()
    }


def present(module: nnx.Module, entries: Entries) -> Entries:
    """Those entries whose parameter the module (which may be one of shapes) has."""
    paths = {path for path, _ in nnx.to_flat_state(nnx.state(module, nnx.Param))}
    return {name: entry for name, entry in entries.items() if entry.path in paths}


def fill(module: nnx.Module, entries: Entries, tensors: Mapping[str, np.ndarray]) -> None:
    """Fills the parameters that entries name, all of them, from named tensors.

    Raises:
        UserError: tensors are missing, unknown or of another shape; all of them are named at once.
    """
    params = dict(nnx.to_flat_state(nnx.state(module, nnx.Param)))
    flat = {entry.path: np.empty(params[entry.path].shape, params[entry.path].dtype) for entry in entries.values()}
    problems = [f"{name} is missing" for name in entries if name not in tensors]
    problems += [f"{name} is unknown" for name in tensors if name not in entries]
    for name, entry in entries.items():
        if name not in tensors:
            continue
        tensor = np.asarray(tensors[name])
        target = flat[entry.path] if entry.layer is None else flat[entry.path][entry.layer]
        expected = entry.write(target).shape
        if tensor.shape != expected:
            problems.append(f"{name} has shape {tensor.shape}, the model expects {expected}")
        else:
            target[...] = entry.read(tensor)
    if problems:
        raise UserError("tensors do not fit the model: " + "; ".join(problems))
    nnx.update(module, nnx.from_flat_state([(path, nnx.Param(jnp.asarray(array))) for path, array in flat.items()]))


def named(state: nnx.State, entries: Entries) -> dict[str, np.ndarray]:
    """Named tensors of a state that is shaped like the model's parameters (the parameters, or their gradients)."""
    flat = {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(state)}
    return {
        name: np.ascontiguousarray(
            entry.write(flat[entry.path] if entry.layer is None else flat[entry.path][entry.layer])
        )
        for name, entry in entries.items()
    }


def uncovered(module: nnx.Module, entries: Iterable[Entry]) -> list[str]:
    """Parameters that no entry fills, by path."""
    covered = {entry.path for entry in entries}
    return sorted(
        "/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(module, nnx.Param)) if path not in covered
    )


Config = Any
