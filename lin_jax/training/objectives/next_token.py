"""The next token."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Int

from lin_jax.evaluation.perplexity import Perplexity, next_token_sums
from lin_jax.losses.cross_entropy import Batch, Sums, shifted_targets
from lin_jax.models import CausalModel, ModelConfig
from lin_jax.models.adapters import AdapterConfig, adapted, with_adapters
from lin_jax.models.params import Params, abstract_model, filled, initial_params, mixer_order, new_params, params_of
from lin_jax.training.objectives.objective import PartRate


class NextToken:
    """Mean cross entropy of the next token, within a document."""

    coefficients: tuple[float, ...] = (1.0,)
    rates: Mapping[str, PartRate] = {}

    def __init__(self, config: ModelConfig, adapters: AdapterConfig | None = None) -> None:
        self._config = config
        self._plain = params_of(abstract_model(config))
        self._abstract = adapted(abstract_model(config), adapters)

    def shapes(self) -> Params:
        """The model's parameters, without values."""
        return params_of(self._abstract)

    def start(self, key: Array, base: CausalModel | None) -> Params:
        """Fresh parameters, or those of a base model, and adapters that do nothing yet."""
        return self.start_of(key, base, lambda path: True)

    def start_of(self, key: Array, base: CausalModel | None, needed: Callable[[tuple[str, ...]], bool]) -> Params:
        """Parameters as in `start`; those that are not needed are zero where the base has none: a draw takes long."""

        def draw(wanted: set[tuple[str, ...]] | None = None) -> Params:
            if wanted is None:
                return new_params(self._config, key)
            drawn = {path for path in wanted if needed(path)}
            found = flatten_dict(new_params(self._config, key, drawn)) if drawn else {}
            shapes = flatten_dict(self._plain)
            blank = {path: np.zeros(shapes[path].shape, shapes[path].dtype) for path in wanted - drawn}
            return unflatten_dict({**found, **jax.tree.map(jnp.asarray, blank)})

        if base is None:
            own = draw()
        else:
            orders = mixer_order(self._config), mixer_order(base.config)
            own = initial_params(self._plain, params_of(base), draw, orders=orders)
        return with_adapters(own, self._abstract, key)

    def frozen(self, base: CausalModel | None) -> Params:
        """None: a base model's parameters go on learning."""
        return {}

    def modules(self) -> Sequence[Any]:
        """The model, with adapters and without any."""
        return [abstract_model(self._config), self._abstract]

    def parts(self, params: Params, frozen: Params) -> tuple[CausalModel, None]:
        """The model, and no heads."""
        return filled(self._abstract, params), None

    def counts(self, batch: Batch) -> Int[Array, "1"]:
        """Targets in the same document as their input."""
        return jnp.sum(shifted_targets(batch, 1).included)[None]

    def sums(self, params: Params, frozen: Params, batch: Batch) -> Sums:
        """Sums `[1]` over the tokens of a batch."""
        return next_token_sums(self.parts(params, frozen)[0], batch)

    def figures(self, sums: Sums) -> dict[str, float]:
        """The perplexity."""
        return {"perplexity": Perplexity.of(sums).perplexity}

    def report(self, params: Params, frozen: Params, batches: Sequence[Batch], folder: Path | None) -> str | None:
        """Nothing more."""
        return None
