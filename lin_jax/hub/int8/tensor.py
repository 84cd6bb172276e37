"""Int8 tensors of an opened checkpoint, each with its factors, as the numbers that they stand for.

`NAME` holds integers from -127 to 127, and `NAME_scale` a float32 factor for each output, in a shape that goes with it:
`[O, 1]` beside `[O, I]`, and `[1, O]` beside `[I, O]`. Factors have 17 significant bits, so that products of both are
exact in float32, and are rounded to the same integers and factors again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lin_jax.errors import UserError
from lin_jax.hub.files import LazyTensor

# The field of `config.json` that names the modules of rounded tensors; layers' numbers are stars.
FIELD = "int8_weights"
SCALE = "_scale"


@dataclass(frozen=True)
class RoundedTensor:
    """An int8 tensor and its factors in files; `np.asarray` reads their products.

    Attributes:
        weight: the integers `[A, B]`.
        scale: the factors `[A, 1]` or `[1, B]`.
    """

    weight: LazyTensor
    scale: LazyTensor

    @property
    def name(self) -> str:
        """Name of the integers."""
        return self.weight.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return self.weight.shape

    @property
    def dtype(self) -> np.dtype:
        """Type of the products."""
        return np.dtype(np.float32)

    @property
    def nbytes(self) -> int:
        """Size of both in the files, in bytes."""
        return self.weight.nbytes + self.scale.nbytes

    @property
    def paths(self) -> set[Path]:
        """The files of both."""
        return {self.weight.pages.path, self.scale.pages.path}

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy
        array = products(np.asarray(self.weight), self.factors)
        return array if dtype is None else array.astype(dtype)

    @property
    def factors(self) -> np.ndarray:
        """The factors, in float32.

        Raises:
            UserError: one of them is none.
        """
        found = np.asarray(self.scale).astype(np.float32)
        if not (np.isfinite(found).all() and (found > 0).all()):
            raise UserError(f"{self.scale.name} holds a factor that is not above zero; copy the checkpoint again")
        return found


def products(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The numbers, in float32, that integers and factors of a fitting shape stand for."""
    return weight.astype(np.float32) * scale


def joined(tensors: Mapping[str, LazyTensor]) -> dict[str, Any]:
    """The tensors of a checkpoint, with every int8 tensor and its factors as one.

    Raises:
        UserError: an int8 tensor has no factors, or those of another.
    """
    found: dict[str, Any] = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.dtype != np.int8:
            continue
        scale = found.pop(name + SCALE, None)
        if scale is None:
            raise UserError(f"{name} is int8, and {name + SCALE} is not there; give a checkpoint with both")
        shapes = [(size, 1) for size in tensor.shape[:1]] + [(1, size) for size in tensor.shape[1:]]
        # PyTorch writes them in another type where the model was turned into one.
        if len(tensor.shape) != 2 or scale.shape not in shapes or not jnp.issubdtype(scale.dtype, jnp.floating):
            raise UserError(
                f"{scale.name} is {scale.dtype} {scale.shape}, and {name} has shape {tensor.shape}; give factors of "
                "its rows or columns"
            )
        found[name] = RoundedTensor(tensor, scale)
    return found
