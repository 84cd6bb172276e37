"""Reasons why implementations cannot take an operation's arrays, told in the same words by all operations."""

from collections.abc import Iterable

from jaxtyping import Array

from pallas_kernels.gpu.launch import obstacle


def obstacles_of(
    names: Iterable[str],
    kernel: str,
    keys: Array,
    values: Array,
    *,
    programs: str | None = None,
    triton: str | None = None,
) -> dict[str, str | None]:
    """For every implementation, why it cannot take some heads; None where it can, as XLA always does.

    Args:
        names: of the implementations.
        kernel: the Triton kernel whose tiles are asked for.
        keys: `[B, T, K, D]`.
        values: `[B, T, K, E]`.
        programs: a reason against all but XLA that the operation has found, None without one.
        triton: likewise against Triton kernels alone.
    """

    def reason(name: str) -> str | None:
        if name == "xla":
            return None
        if programs is not None or not name.startswith("gpu"):
            return programs
        sizes = keys.shape[3], values.shape[3]
        return triton or obstacle(kernel, *sizes, keys.dtype, interpret=name == "gpu_interpreted")

    return {name: reason(name) for name in names}


def unlike_types(queries: Array, keys: Array, values: Array) -> str | None:
    """The reason why no kernel takes rows of these types; None if kernels do."""
    kinds = {str(each.dtype) for each in (queries, keys, values)}
    if kinds in ({"float32"}, {"bfloat16"}):
        return None
    return f"queries, keys and values are {', '.join(sorted(kinds))}, not all float32 or all bfloat16"
