"""Adapters in a run: low-rank updates that learn on a frozen model, and the parts of it that learn in full."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from lin_jax.errors import UserError
from lin_jax.models.lora import adapters, add_lora
from lin_jax.models.params import Params, params_of

ParameterPath = tuple[str, ...]

# Which parameters a part of a model is, by the names on the way to them.
PARTS: dict[str, Callable[[ParameterPath], bool]] = {
    "embeddings": lambda path: any(name.startswith("embed") for name in path[:-1]),
    "norms": lambda path: any(name == "norm" or name.endswith("_norm") for name in path),
    "mixer": lambda path: "mixer" in path,
    "head": lambda path: "head" in path,
    "projections": lambda path: "attention" in path and bool({"query", "key", "value", "out", "qkv"} & set(path)),
    "feed_forward": lambda path: "feed_forward" in path,
}


@dataclass(frozen=True)
class AdapterConfig:
    """Low-rank adapters (LoRA, Hu et al. 2021) on a frozen model.

    The defaults are those of You et al. (ICML 2024): queries, keys, values and the way out of attention, with
    embeddings and norms in full; and the mixer, which a linearized model has new.

    Attributes:
        rank: rank of the updates.
        alpha: numerator of their factor `alpha / rank`.
        target_modules: names of the linear layers that get one: query, key, value, out, gate, up, down (of LLaMA).
        modules_to_save: parts that learn in full beside them: embeddings, norms, mixer, head, feed_forward.
    """

    rank: int = 8
    alpha: float = 16.0
    target_modules: tuple[str, ...] = ("query", "key", "value", "out")
    modules_to_save: tuple[str, ...] = ("embeddings", "norms", "mixer")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"adapters.rank is {self.rank}; give 1 or more")
        if not self.target_modules:
            raise UserError("adapters.target_modules is empty; name linear layers, such as query, key, value, out")
        check_parts(
            "adapters.modules_to_save", self.modules_to_save, tuple(part for part in PARTS if part != "projections")
        )


def check_parts(option: str, named: tuple[str, ...], known: tuple[str, ...]) -> None:
    """Refuses names of parts that an option does not know.

    Raises:
        UserError: there is one.
    """
    if unknown := [part for part in named if part not in known]:
        raise UserError(f"{option} names '{unknown[0]}'; choose among {', '.join(known)}")


@dataclass(frozen=True)
class TrainableFilter:
    """Selection of the parameters of a model that learn; the others are frozen.

    Attributes:
        parts: names in PARTS of what learns in full.
        inside: learn only what has this name on the way to it, of `attention` the mixers of a mix, too; None is no such
            limit.
        layers: the first layer that learns and the one after the last; None is all. A mixer's parameters count as
            learning in every layer: a base model may lack them, so that they belong into checkpoints.
    """

    parts: tuple[str, ...]
    inside: str | None = None
    layers: tuple[int, int] | None = None

    def includes(self, path: ParameterPath) -> bool:
        """True for a parameter that learns, at least in some layers; draft heads beside a model always do."""
        if path[0] == "heads":
            return True
        # Layers of a mix have their mixers beside them, kind by kind, and not inside of their attention.
        if self.inside is not None and self.inside not in path and not (self.inside == "attention" and "mixer" in path):
            return False
        return is_adapter(path) or (("base" not in path[-2:-1] or "mixer" in path) and self._named(path))

    def _named(self, path: ParameterPath) -> bool:
        return any(PARTS[part](path) for part in self.parts)

    def slice_of(self, path: ParameterPath) -> slice | None:
        """The layers in which a parameter that `includes` names learns, if not in all that there are of it."""
        if self.layers is None or "layers" not in path or "mixer" in path:
            return None
        return slice(*self.layers)


def is_adapter(path: ParameterPath) -> bool:
    """True for a parameter of an adapter."""
    return path[-1] in ("lora_a", "lora_b")


def adapted(model: Any, config: AdapterConfig | None) -> Any:
    """A model of shapes with adapters on its layers; itself without any.

    Raises:
        UserError: it has no layer of a name.
    """
    if config is None:
        return model
    linear = {path[-1] for path, node in nnx.iter_modules(model) if isinstance(node, nnx.Linear)}
    if unknown := [name for name in config.target_modules if name not in linear]:
        known = ", ".join(sorted(map(str, linear)))
        raise UserError(
            f"adapters.target_modules names '{unknown[0]}', which the model has no layer of; choose among {known}"
        )

    def add(model: Any) -> Any:
        add_lora(model, config.rank, config.alpha, targets=config.target_modules, rngs=nnx.Rngs(0))
        return model

    return nnx.eval_shape(add, model)


def with_adapters(params: Params, model: Any, key: Array) -> Params:
    """A model's parameters and those of adapters that do nothing yet, as the model of shapes with adapters has them.

    B is zero, and A is drawn as PyTorch and PEFT draw it: evenly from `(-I^-1/2, I^-1/2)` for I inputs.

    Args:
        params: parameters of the model without adapters.
        model: the model of shapes, with adapters or without any.
        key: a random key.
    """
    places = {tuple(map(str, path)) for path in adapters(model)}
    moved = {_under(path, places): value for path, value in flatten_dict(params).items()}
    new = {path: like for path, like in flatten_dict(params_of(model)).items() if path not in moved}
    for number, (path, like) in enumerate(sorted(new.items())):
        if path[-1] == "lora_b":
            moved[path] = jnp.zeros(like.shape, like.dtype)
        else:
            bound = like.shape[-2] ** -0.5
            moved[path] = jax.random.uniform(jax.random.fold_in(key, number), like.shape, like.dtype, -bound, bound)
    return unflatten_dict(moved)


def _under(path: ParameterPath, places: set[ParameterPath]) -> ParameterPath:
    """The path of a layer's parameter under the layer's adapter."""
    return (*path[:-1], "base", path[-1]) if path[:-1] in places else path
