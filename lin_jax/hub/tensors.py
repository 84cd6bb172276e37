"""Tensors of a checkpoint by name: the variable of each in a model, and its transform on the way in and out.

Convolutions are stored as `[H, 1, K, 1]`, a centred kernel in which tap j sees `v[t + j - K // 2]`; of a masked one
only the half that looks back is read. The factor of the grouped branch is stored as `[1]`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from lin_jax.attention.feature_maps import RandomProjection
from lin_jax.errors import UserError
from lin_jax.hub.conversion.blocks import equal

_STRIP = 256


def same(array: np.ndarray) -> np.ndarray:
    """The array itself."""
    return array


def transpose(array: np.ndarray) -> np.ndarray:
    """The array with its axes reversed."""
    return array.T


def taps(kernel: np.ndarray) -> np.ndarray:
    """Taps `[H, W]`, lag 0 first, of the backward-looking half of a centred kernel `[H, 1, K, 1]`."""
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
class TensorEntry:
    """The variable of a checkpoint's tensor, and the transforms between the two.

    Attributes:
        path: of the variable in the model.
        read: transform from the checkpoint's shape to the model's.
        write: the inverse of `read`.
        layer: index of the layer in a stacked variable; None for a variable that is not stacked.
    """

    path: tuple[Any, ...]
    read: Callable[[np.ndarray], np.ndarray] = same
    write: Callable[[np.ndarray], np.ndarray] = same
    layer: int | None = None

    def of_layer(self, stack: tuple[str, ...], layer: int) -> "TensorEntry":
        """The entry of this tensor for one layer of a stack."""
        return replace(self, path=(*stack, *self.path), layer=layer)

    def inside(self, *path: str) -> "TensorEntry":
        """The entry of this tensor for a model that is part of another."""
        return replace(self, path=(*path, *self.path))


def kernel(*path: str) -> TensorEntry:
    """Entry of the weight `[out, in]` of a linear layer."""
    return TensorEntry((*path, "kernel"), transpose, transpose)


def convolution(*path: str, centred: bool = False) -> TensorEntry:
    """Entry of the kernel of a convolution."""
    transforms = (centred_taps, centred_kernel) if centred else (taps, masked_kernel)
    return TensorEntry((*path, "taps"), *transforms)


Entries = dict[str, TensorEntry]


def stacked(prefix: str, layer_entries: Mapping[str, TensorEntry], stack: tuple[str, ...], count: int) -> Entries:
    """Entries of all layers of a stack: `prefix.LAYER.name` for each name."""
    return {
        f"{prefix}.{layer}.{name}": entry.of_layer(stack, layer)
        for layer in range(count)
        for name, entry in layer_entries.items()
    }


def stored(module: nnx.Module) -> dict[tuple[Any, ...], Any]:
    """Variables of a module (which may be abstract) that a checkpoint holds, by path: parameters, projections."""
    return dict(nnx.to_flat_state(nnx.state(module, (nnx.Param, RandomProjection))))


def present(module: nnx.Module, entries: Entries) -> Entries:
    """Selects the entries whose variable the module (which may be abstract) has."""
    paths = stored(module)
    return {name: entry for name, entry in entries.items() if entry.path in paths}


# The sharding of a variable by its path and shape; None is the default device.
ShardingFn = Callable[[tuple[Any, ...], tuple[int, ...]], jax.sharding.Sharding | None]


def fill(
    module: nnx.Module,
    entries: Entries,
    tensors: Mapping[str, Any],
    *,
    shardings: ShardingFn | None = None,
    note: Callable[[int], Any] = lambda size: None,
    filled: Callable[[tuple[Any, ...]], Any] = lambda path: None,
) -> None:
    """Fills the variables that entries name, all of them, from named tensors.

    One variable at a time is assembled in memory, converted to the module's own type, and given to its devices, so the
    host holds one variable beside what is placed on it. Where nothing is to be assembled or converted, it is taken from
    the pages of its file. Nothing is read before everything is known to fit.

    Args:
        module: the module, which may be abstract but for variables of which only some layers are filled.
        entries: the variable of every tensor, by the tensor's name.
        tensors: arrays, or tensors that are yet to be read, by name.
        shardings: the sharding of a variable by its path and shape; None is the default device.
        note: called with the bytes of every tensor that was read.
        filled: called with the path of every variable once it is filled.

    Raises:
        UserError: tensors are missing, unknown or of another shape, which is said of all at once; or a number of one is
            NaN or infinite.
    """
    if problems := mismatches(module, entries, tensors):
        raise UserError(f"tensors do not fit the model: {summary(problems)}")
    variables = stored(module)
    for path, parts in _by_path(entries).items():
        variable = variables[path]
        sharding = None if shardings is None else shardings(path, variable.shape)
        # Layers that no tensor is for keep what they hold.
        whole = parts[0][1].layer is None or len(parts) == variable.shape[0]
        if whole and sharding is None and (mapped := _mapped(parts, tensors, variable)) is not None:
            note(tensors[parts[0][0]].nbytes)
            nnx.update(module, nnx.from_flat_state([(path, variable.replace(mapped))]))
            filled(path)
            # What was copied or rounded is not needed any more; the rest is there again when it is used.
            tensors[parts[0][0]].release()
            continue
        # Numbers in bfloat16 may be kept as their bits, in integers.
        bits = variable.dtype == np.uint16
        kept = ml_dtypes.bfloat16 if bits else variable.dtype
        buffer = np.empty(variable.shape, kept) if whole else np.array(variable[...])
        for name, entry in parts:
            tensor = np.asarray(tensors[name])
            note(tensor.nbytes)
            part = buffer[... if entry.layer is None else entry.layer]
            copy_into(part, entry.read(tensor))
            check_finite(name, part)
        placed = place(buffer.view(np.uint16) if bits else buffer, sharding)
        nnx.update(module, nnx.from_flat_state([(path, variable.replace(placed))]))
        filled(path)


def _mapped(parts: Sequence[tuple[str, TensorEntry]], tensors: Mapping[str, Any], variable: Any) -> jax.Array | None:
    """A variable from the pages of its file, as it is stored; None where it must be assembled or converted.

    JAX copies what does not lie as its own arrays do (by 64 bytes).
    """
    (name, entry), *more = parts
    tensor = tensors[name]
    plain = not more and entry.layer is None and entry.read is same and hasattr(tensor, "mapped")
    bits = variable.dtype == np.uint16 and tensor.dtype == ml_dtypes.bfloat16
    if not plain or (tensor.dtype != variable.dtype and not bits):
        return None
    pages = tensor.mapped()
    check_finite(name, pages)
    pages = pages.view(np.uint16) if bits else pages
    return jax.device_put(pages).block_until_ready()


def check_finite(name: str, array: np.ndarray) -> None:
    """Refuses a tensor with a number that is NaN or infinite.

    Raises:
        UserError: it has one.
    """
    if not is_finite(array):
        raise UserError(
            f"{name} holds NaN or infinity as {array.dtype}, so the model writes nothing of use; "
            "give the checkpoint before it, or a wider type"
        )


@dataclass(frozen=True)
class Mismatch:
    """A tensor that does not fit a model.

    Attributes:
        name: of the tensor.
        kind: `is missing`, `is unknown`, or `has shape`.
        detail: the shapes.
    """

    name: str
    kind: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.kind}{self.detail}"


def mismatches(module: nnx.Module, entries: Entries, tensors: Mapping[str, Any]) -> list[Mismatch]:
    """Lists tensors that are missing, unknown or of another shape; reads nothing."""
    variables = stored(module)
    problems = [Mismatch(name, "is missing") for name in entries if name not in tensors]
    problems += [Mismatch(name, "is unknown") for name in tensors if name not in entries]
    for name, entry in entries.items():
        if name not in tensors:
            continue
        shape, expected = tuple(tensors[name].shape), written_shape(entry, variables[entry.path])
        if shape != expected:
            problems.append(Mismatch(name, "has shape", f" {shape}, the model expects {expected}"))
    return problems


def summary(problems: Sequence[Mismatch], most: int = 3) -> str:
    """The first few tensors of each kind, how many more there are, and what their names have in common."""
    parts: list[str] = []
    for kind in dict.fromkeys(each.kind for each in problems):
        alike = [each for each in problems if each.kind == kind]
        # One more takes no more room than the word that there is one.
        if len(alike) <= most + 1:
            parts += map(str, alike)
        else:
            parts += map(str, alike[:most])
            common = _common([each.name for each in alike])
            among = f", all of them {common}" if common else ""
            what = {"is missing": "missing", "is unknown": "unknown"}.get(kind, "of another shape")
            parts.append(f"{len(alike) - most:,} more are {what}{among}")
    return "; ".join(parts)


def _common(names: Sequence[str]) -> str:
    """The parts between dots that all names share at both ends, with a star for the rest; empty if there are none."""
    split = [re.sub(r"\.\d+(?=\.)", ".*", name).split(".") for name in names]
    if all(parts == split[0] for parts in split):
        return ".".join(split[0])
    first, last = (_shared(split), _shared([parts[::-1] for parts in split])[::-1])
    return ".".join([*first, "*", *last]) if first or last else ""


def _shared(split: Sequence[Sequence[str]]) -> list[str]:
    """The parts at the beginning that all have; the last part of the shortest is left for the star."""
    count = 0
    shortest = min(len(parts) for parts in split) - 1
    while count < shortest and all(parts[count] == split[0][count] for parts in split):
        count += 1
    return list(split[0][:count])


def written_shape(entry: TensorEntry, variable: Any) -> tuple[int, ...]:
    """Shape of a tensor in a checkpoint."""
    shape = variable.shape if entry.layer is None else variable.shape[1:]
    # One number, seen as an array of that shape: nothing is allocated.
    return entry.write(np.broadcast_to(np.zeros((), np.int8), shape)).shape


def copy_into(target: np.ndarray, source: np.ndarray) -> None:
    """Copies an array, in strips if it is transposed: several times as fast, since caches hold a strip."""
    if source.ndim < 2 or source.flags.c_contiguous:
        target[...] = source
        return
    for begin in range(0, source.shape[-1], _STRIP):
        strip = np.s_[..., begin : begin + _STRIP]
        target[strip] = source[strip]


def is_finite(array: np.ndarray) -> bool:
    """False if a number is NaN or infinite; by their bits, which takes no memory and is fast for bfloat16 too."""
    if not jnp.issubdtype(array.dtype, jnp.floating) or not array.size:
        return True
    size = array.dtype.itemsize
    limits = np.array([np.inf, -np.inf], array.dtype)
    signed, unsigned = np.dtype(f"i{size}"), np.dtype(f"u{size}")
    # Beyond the bits of infinity, of either sign, there is only NaN.
    positive, negative = limits.view(signed)[0], limits.view(unsigned)[1]
    return bool(array.view(signed).max() < positive and array.view(unsigned).max() < negative)


def place(buffer: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Puts an array on its devices; with a sharding, each process copies their parts to its own devices."""
    if sharding is None:
        return jax.device_put(buffer)
    return jax.make_array_from_callback(buffer.shape, sharding, lambda index: buffer[index])


def without_copy(tensors: dict[str, Any], copy: str, first: str) -> dict[str, Any]:
    """Drops the tensor `copy` if it equals `first`: some checkpoints store a tied head twice."""
    if copy in tensors and first in tensors and equal(tensors[copy], tensors[first]):
        return {name: tensor for name, tensor in tensors.items() if name != copy}
    return tensors


def named(state: Any, entries: Entries) -> dict[str, np.ndarray]:
    """Named tensors of a state: of parameters, or of gradients, which random projections do not have."""
    flat = dict(nnx.to_flat_state(state))
    return {name: written(flat[entry.path], entry) for name, entry in entries.items() if entry.path in flat}


def written(variable: Any, entry: TensorEntry) -> np.ndarray:
    """One tensor in its checkpoint form; of a stacked variable only this layer is copied from the devices."""
    array = entry.write(np.asarray(variable[... if entry.layer is None else entry.layer]))
    if array.flags.c_contiguous:
        return array
    copy = np.empty(array.shape, array.dtype)
    copy_into(copy, array)
    return copy


def uncovered(module: nnx.Module, entries: Entries) -> list[str]:
    """Paths of variables that no entry fills."""
    covered = {entry.path for entry in entries.values()}
    return sorted("/".join(map(str, path)) for path in stored(module) if path not in covered)


def _by_path(entries: Entries) -> dict[tuple[str, ...], list[tuple[str, TensorEntry]]]:
    paths: dict[tuple[str, ...], list[tuple[str, TensorEntry]]] = {}
    for name, entry in entries.items():
        paths.setdefault(entry.path, []).append((name, entry))
    return paths
