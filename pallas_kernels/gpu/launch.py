"""Launching a Triton kernel from JAX: through jax-triton on a GPU, or in Triton's interpreter anywhere, for tests."""

import importlib
import importlib.util
import os
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.implementations import UnsupportedError
from pallas_kernels.tiles import untiled

# Triton's interpreter puts its language's functions in other places while it runs.
_one_at_a_time = threading.Lock()
NEEDED = {False: ("jax_triton", "triton"), True: ("triton", "torch")}


def obstacle(kernel: str, key_size: int, value_size: int, dtype: Any, *, interpret: bool) -> str | None:
    """The reason why a Triton kernel cannot run here, or not with such heads; None if it can."""
    missing = [name for name in NEEDED[interpret] if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} is not installed; install 'lin-jax[gpu]'"
    return untiled(kernel, key_size, value_size, dtype)


def kernels_of(module: str, interpret: bool) -> ModuleType:
    """A module of Triton kernels. Whether they are compiled or interpreted is settled when Triton is first imported.

    Raises:
        UnsupportedError: Triton has been imported for the other purpose.
    """
    if "triton" not in sys.modules:
        with _settled(interpret):
            importlib.import_module("triton")
    import triton

    with _settled(interpret):
        found = importlib.import_module(module)
    if isinstance(triton.language.sum, triton.JITFunction) == interpret:
        wanted = "TRITON_INTERPRET=1" if interpret else "no TRITON_INTERPRET"
        raise UnsupportedError(
            f"Triton has been imported to {'compile' if interpret else 'interpret'}; begin with {wanted}"
        )
    return found


def _settled(interpret: bool) -> Any:
    """An environment that tells Triton whether to interpret."""
    return mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1" if interpret else "0"})


def launch(
    kernel: Any,
    arguments: Sequence[Array | int],
    outputs: Sequence[jax.ShapeDtypeStruct],
    *,
    grid: tuple[int, ...],
    constants: Mapping[str, Any],
    warps: int,
    stages: int,
    interpret: bool,
    aliases: Mapping[int, int] | None = None,
) -> list[Array]:
    """Runs a kernel over arrays and numbers.

    Args:
        kernel: a function that `triton.jit` made: arguments, then outputs (those without an alias), then constants.
        arguments: arrays and numbers, in the kernel's order.
        outputs: shapes and types of what it writes.
        grid: number of programs.
        constants: compile-time constants of the kernel.
        warps: of a program.
        stages: of software pipelines.
        interpret: run it in Triton's interpreter, on the host.
        aliases: arguments by number that become outputs by number, changed where they lie.
    """
    aliases = dict(aliases or {})
    if not interpret:
        with warnings.catch_warnings():
            # JAX's references would do instead of aliases, but for the effects that they leave in a program.
            warnings.filterwarnings("ignore", "input_output_aliases", DeprecationWarning)
            found = _jax_triton().triton_call(
                *arguments,
                kernel=kernel,
                out_type=list(outputs),
                grid=grid,
                num_warps=warps,
                num_stages=stages,
                input_output_aliases=aliases,
                **constants,
            )
        return list(found)
    arrays = [each for each in arguments if not isinstance(each, int)]
    numbers = {index: each for index, each in enumerate(arguments) if isinstance(each, int)}
    run = partial(_interpreted, kernel, numbers, tuple(outputs), grid, dict(constants), aliases)
    return list(jax.pure_callback(run, list(outputs), *arrays, vmap_method="sequential"))


def _jax_triton() -> ModuleType:
    """jax-triton, which imports only if Triton has a name that 3.6 lacks; our kernels do not use it."""
    driver = importlib.import_module("triton.backends.nvidia.driver")
    if not hasattr(driver, "TMA_TF32"):
        driver.TMA_TF32 = 11  # type: ignore[attr-defined] # CU_TENSOR_MAP_DATA_TYPE_TFLOAT32
    return importlib.import_module("jax_triton")


def _interpreted(
    kernel: Any,
    numbers: Mapping[int, int],
    outputs: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    constants: Mapping[str, Any],
    aliases: Mapping[int, int],
    *arrays: Any,
) -> list[np.ndarray]:
    """Runs a kernel in Triton's interpreter; outputs that it does not write are NaN."""
    arguments: list[Any] = [_tensor(np.array(each)) for each in arrays]
    for index, number in sorted(numbers.items()):
        arguments.insert(index, number)
    changed = {other: arguments[one] for one, other in aliases.items()}
    written = []
    for index, output in enumerate(outputs):
        empty = np.full(output.shape, np.nan if jnp.issubdtype(output.dtype, jnp.floating) else -1, output.dtype)
        written.append(changed[index] if index in changed else _tensor(empty))
    # Bad shifts of masked rows are the kernels' own business.
    with _one_at_a_time, np.errstate(all="ignore"), _settled(True):
        own = (each for index, each in enumerate(written) if index not in changed)
        kernel[grid](*arguments, *own, **constants)
    return [_array(each, output.dtype) for each, output in zip(written, outputs, strict=True)]


def _tensor(array: np.ndarray) -> Any:
    import torch

    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _array(tensor: Any, dtype: Any) -> np.ndarray:
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(dtype)
    return tensor.numpy()
