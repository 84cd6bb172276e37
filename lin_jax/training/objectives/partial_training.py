"""Any objective of a model, of which only a part learns: adapters, mixers, some layers. The rest is a base model's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Int

from lin_jax.losses.cross_entropy import Batch, Sums
from lin_jax.models.adapters import TrainableFilter, is_adapter
from lin_jax.models.lora import merge_lora
from lin_jax.models.params import Params, filled, params_of
from lin_jax.training.objectives.next_token import NextToken
from lin_jax.training.objectives.objective import PartRate, training_sums
from pallas_kernels.precision import upcast


class PartialTraining:
    """An objective, some of whose parameters learn, in float32 or better, whatever type the frozen ones have.

    What learns is a tree of its own; a parameter of which only some layers learn is there as these layers. The frozen
    parameters are `rest` among those that do not learn, with the whole of such a parameter.

    Args:
        whole: the objective, all of whose parameters would learn.
        learning: which of them do.
        seed: of the run, from which comes what neither learns nor is in the base model.
    """

    def __init__(self, whole: Any, learning: TrainableFilter, seed: int) -> None:
        self._whole = whole
        self._learning = learning
        self._key = initial_key(seed)
        self.coefficients: tuple[float, ...] = whole.coefficients
        self.rates: Mapping[str, PartRate] = whole.rates

    def shapes(self) -> Params:
        """The parameters that learn, without values."""
        return jax.eval_shape(self.chosen, self._whole.shapes())

    def start(self, key: Array, base: Any) -> Params:
        """The base model's values of what learns, adapters that do nothing, and a new mixer's values."""
        return jax.tree.map(jnp.array, self.chosen(self._whole.start(self._key, base)))

    def frozen(self, base: Any) -> Params:
        """The others, as `rest`; adapters of layers that do not learn are zero."""
        learning, rest = self._learning, {}

        def needed(path: tuple[str, ...]) -> bool:
            return not learning.includes(path) or learning.slice_of(path) is not None

        if isinstance(self._whole, NextToken):
            every = self._whole.start_of(self._key, base, needed)
        else:
            every = self._whole.start(self._key, base)
        for path, value in flatten_dict(every).items():
            if needed(path):
                rest[path] = jnp.zeros_like(value) if is_adapter(path) else value
        return {"rest": unflatten_dict(rest), **self._whole.frozen(base)}

    def modules(self) -> Sequence[Any]:
        """Those of the whole objective."""
        return self._whole.modules()

    def joined(self, params: Params, frozen: Params) -> Params:
        """All parameters, learnt and frozen, as the whole objective has them."""
        every = flatten_dict(frozen["rest"])
        for path, value in flatten_dict(params).items():
            part = self._learning.slice_of(path)
            if part is not None:
                before, after = every[path][: part.start], every[path][part.stop :]
                value = jnp.concatenate([before, value.astype(before.dtype), after])
            every[path] = value
        return unflatten_dict(every)

    def parts(self, params: Params, frozen: Params) -> tuple[Any, Any]:
        """The model, adapters merged, in the type of the frozen parameters, and the heads beside it, if any."""
        model, heads = self.unmerged(params, frozen)
        merge_lora(model)
        dtype = jnp.dtype(model.config.param_dtype)
        return filled(model, jax.tree.map(lambda value: value.astype(dtype), params_of(model))), heads

    def unmerged(self, params: Params, frozen: Params) -> tuple[Any, Any]:
        """The model with its adapters on it, and the heads beside it, if any."""
        return self._whole.parts(self.joined(params, frozen), frozen)

    def counts(self, batch: Batch) -> Int[Array, " K"]:
        """Those of the whole objective."""
        return self._whole.counts(batch)

    def sums(self, params: Params, frozen: Params, batch: Batch) -> Sums:
        """Those of the whole objective."""
        return self._whole.sums(self.joined(params, frozen), frozen, batch)

    def training_sums(self, params: Params, frozen: Params, batch: Batch, key: Array) -> Sums:
        """Those of the whole objective in training."""
        return training_sums(self._whole, self.joined(params, frozen), frozen, batch, key)

    def figures(self, sums: Sums) -> dict[str, float]:
        """Those of the whole objective."""
        return self._whole.figures(sums)

    def report(self, params: Params, frozen: Params, batches: Sequence[Batch], folder: Path | None) -> str | None:
        """That of the whole objective."""
        return self._whole.report(self.joined(params, frozen), frozen, batches, folder)

    def chosen(self, params: Params) -> Params:
        """Of all parameters those that learn, and of stacked ones the layers that do."""
        learning, chosen = self._learning, {}
        for path, value in flatten_dict(params).items():
            if learning.includes(path):
                part = learning.slice_of(path)
                chosen[path] = value if part is None else value[part]
        return upcast(unflatten_dict(chosen))


def initial_key(seed: int) -> Array:
    """The random key of a run's initial parameters."""
    return jax.random.split(jax.random.key(seed))[1]
