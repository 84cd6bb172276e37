"""Low-rank adapters (LoRA, Hu et al. 2021) on the linear layers of any model."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from lin_jax.errors import UserError

ATTENTION_PROJECTIONS = ("query", "key", "value", "out", "qkv")


class LowRankLinear(nnx.Module):
    """`base(x) + alpha / rank * x A B`, with B zero at first.

    Args:
        base: the linear layer, or as many of them as a stack has, with a leading layer axis.
        rank: rank of the update.
        alpha: numerator of the update's factor.
        rngs: random keys.
    """

    def __init__(self, base: nnx.Linear, rank: int, alpha: float, *, rngs: nnx.Rngs) -> None:
        self.base = base
        self.scale = alpha / rank
        *stack, size_in, size_out = base.kernel.shape

        def update(rngs: nnx.Rngs) -> nnx.LoRA:
            return nnx.LoRA(size_in, rank, size_out, dtype=base.dtype, param_dtype=base.param_dtype, rngs=rngs)

        self.update = nnx.vmap(update)(rngs.split(stack[0])) if stack else update(rngs)
        reads, writes = base.kernel.get_metadata().get("axes", (None, None))
        self.update.lora_a.set_metadata("axes", (reads, None))
        self.update.lora_b.set_metadata("axes", (None, writes))

    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        """Applies the layer with its update."""
        return self.base(x) + self.scale * self.update(x)

    def merged(self) -> nnx.Linear:
        """The base layer with the update added to its kernel, in float64 on the host.

        Rank after rank and number by number: a matrix product adds up in another order on every device, and merging
        must give the same numbers on all of them, for draft heads know the model that they were trained on by these.
        """
        kernel = np.array(self.base.kernel[...], np.float64)
        first, second = (np.asarray(part[...], np.float64) for part in (self.update.lora_a, self.update.lora_b))
        for rank in range(first.shape[-1]):
            kernel += self.scale * first[..., :, rank, None] * second[..., rank, None, :]
        self.base.kernel[...] = jnp.asarray(kernel.astype(self.base.kernel.dtype))
        return self.base


def add_lora(
    model: nnx.Module, rank: int, alpha: float, *, targets: Sequence[str] = ATTENTION_PROJECTIONS, rngs: nnx.Rngs
) -> None:
    """Puts an adapter on every linear layer of the given names, in place. Its parameters are `nnx.LoRAParam`s.

    Args:
        model: any model.
        rank: rank of the updates.
        alpha: numerator of their factor `alpha / rank`.
        targets: attribute names of layers, such as query, key, value, out, gate, up, down.
        rngs: random keys.

    Raises:
        UserError: no linear layer has one of the names, or the rank is not positive.
    """
    if rank < 1:
        raise UserError(f"the rank of the adapters is {rank}; give at least 1")
    found = [(path, node) for path, node in nnx.iter_modules(model) if isinstance(node, nnx.Linear)]
    chosen = [(path, node) for path, node in found if path[-1] in targets]
    if missing := sorted(set(targets) - {path[-1] for path, _ in chosen} - set(ATTENTION_PROJECTIONS)):
        names = ", ".join(sorted({str(path[-1]) for path, _ in found}))
        raise UserError(f"no linear layer is named '{missing[0]}'; choose among {names}")
    for path, _ in chosen:
        adapt(model, path, rank, alpha, rngs=rngs)


def adapt(model: nnx.Module, path: Sequence[Any], rank: int, alpha: float, *, rngs: nnx.Rngs) -> LowRankLinear:
    """Puts an adapter on the linear layer at a path, in place, and returns it."""
    holder: Any = model
    for part in path[:-1]:
        holder = getattr(holder, part)
    adapter = LowRankLinear(getattr(holder, path[-1]), rank, alpha, rngs=rngs)
    setattr(holder, path[-1], adapter)
    return adapter


def merge_lora(model: nnx.Module) -> None:
    """Adds every adapter to the layer below it and takes it away, in place."""
    for path, adapter in adapters(model).items():
        holder: Any = model
        for part in path[:-1]:
            holder = getattr(holder, part)
        setattr(holder, path[-1], adapter.merged())


def adapters(model: nnx.Module) -> dict[tuple[Any, ...], LowRankLinear]:
    """The adapters of a model by the path of the layer that they are on."""
    return {tuple(path): node for path, node in nnx.iter_modules(model) if isinstance(node, LowRankLinear)}
