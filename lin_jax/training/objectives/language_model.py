"""The next token."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from lin_jax.evaluation.perplexity import Perplexity, next_token_sums
from lin_jax.evaluation.targets import Batch, Sums, targets_ahead
from lin_jax.models import Llama, LlamaConfig
from lin_jax.training.adapters import AdapterConfig, adapted, with_adapters
from lin_jax.training.objectives.objective import PartRate
from lin_jax.training.parameters import Params, abstract_model, filled, initial_params, params_of

if TYPE_CHECKING:
    from lin_jax.training.config import RunConfig


class LanguageModel:
    """Mean cross entropy of the next token, within a document."""

    has_model: ClassVar[bool] = True
    heads_name: ClassVar[str | None] = None
    coefficients: tuple[float, ...] = (1.0,)
    rates: Mapping[str, PartRate] = {}

    def __init__(self, config: LlamaConfig, adapters: AdapterConfig | None = None) -> None:
        self._config = config
        self._abstract = adapted(abstract_model(config), adapters)

    @classmethod
    def check(cls, config: "RunConfig") -> None:
        """Fits any run."""

    @classmethod
    def of(cls, config: "RunConfig") -> "LanguageModel":
        """The objective of a run."""
        return cls(config.model, config.adapters)

    def shapes(self) -> Params:
        """The model's parameters, without values."""
        return params_of(self._abstract)

    def start(self, key: Array, base: Llama | None) -> Params:
        """Fresh parameters, or those of a base model, and adapters that do nothing yet."""
        fresh = params_of(jax.jit(lambda key: Llama(self._config, rngs=nnx.Rngs(key)))(key))
        return with_adapters(fresh if base is None else initial_params(fresh, params_of(base)), self._abstract, key)

    def frozen(self, base: Llama | None) -> Params:
        """None: a base model's parameters go on learning."""
        return {}

    def parts(self, params: Params, frozen: Params) -> tuple[Llama, None]:
        """The model, and no heads."""
        return filled(self._abstract, params), None

    def counts(self, batch: Batch) -> Int[Array, "1"]:
        """Targets in the same document as their input."""
        return jnp.sum(targets_ahead(batch, 1).included)[None]

    def sums(self, params: Params, frozen: Params, batch: Batch) -> Sums:
        """Sums `[1]` over the tokens of a batch."""
        return next_token_sums(self.parts(params, frozen)[0], batch)

    def figures(self, sums: Sums) -> dict[str, float]:
        """The perplexity."""
        return {"perplexity": Perplexity.of(sums).perplexity}

    def report(self, params: Params, frozen: Params, batches: Sequence[Batch], folder: Path) -> str | None:
        """Nothing more."""
        return None
