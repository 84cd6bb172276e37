"""Options of computation, whatever a model's architecture: types of numbers, recomputation, unrolled loops."""

from dataclasses import dataclass, fields
from typing import Any

from lin_jax.errors import UserError

DTYPES = ("float32", "bfloat16", "float64")
# What may be kept of a layer that is recomputed in the backward pass.
REMAT_KEEPS = ("nothing", "products")
# Options that change neither parameters nor results.
RESULT_NEUTRAL = frozenset({"remat", "remat_keeps", "unroll"})


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Options of computation: those of a model's configuration that a run says itself, also of a given checkpoint.

    Every model's configuration extends it; `config.compute` is this part alone.

    Attributes:
        dtype: type of activations: float32, bfloat16 or float64.
        param_dtype: type of parameters.
        remat: recompute each layer's activations in the backward pass instead of keeping them.
        remat_keeps: what remat keeps all the same: nothing, or products (with weights, and attention by kernels), so
            that only cheap work is done twice.
        unroll: layers per step of the layer loop; more compiles longer and runs faster on small models.

    Raises:
        UserError: a type or `remat_keeps` is unknown.
    """

    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: bool = False
    remat_keeps: str = "nothing"
    unroll: int = 1

    def __post_init__(self) -> None:
        for name, known in (("dtype", DTYPES), ("param_dtype", DTYPES), ("remat_keeps", REMAT_KEEPS)):
            check_choice(self, name, known)

    @property
    def compute(self) -> "ComputeConfig":
        """The options of computation alone."""
        return ComputeConfig(**{each.name: getattr(self, each.name) for each in fields(ComputeConfig)})


def check_choice(config: Any, name: str, known: tuple[str, ...]) -> None:
    """Refuses an option of a model that is not one of the known ones.

    Raises:
        UserError: it is not.
    """
    if getattr(config, name) not in known:
        raise UserError(f"model.{name} '{getattr(config, name)}' is unknown; choose one of {', '.join(known)}")
