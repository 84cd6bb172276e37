"""Classification and regression of a whole text, or of a pair."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Int

from lin_jax.data.glue.tasks import Task
from lin_jax.evaluation.classification import Answers, confusion, scored
from lin_jax.losses.cross_entropy import Batch, Sums, sum_over_batches
from lin_jax.models import CausalModel, ModelConfig
from lin_jax.models.params import Params, abstract_model, filled, initial_params, mixer_order, new_params, params_of
from lin_jax.models.registry import CLASSIFIER
from lin_jax.training.objectives.objective import PartRate

REPORT_FILE = "glue.json"
# Where a causal language model stands in a classifier.
_BODY = "model"
_INPUTS = ("tokens", "mask", "types")


class Classification:
    """Mean cross entropy of the class of a text; or mean squared error of a number, where the task asks for one.

    Args:
        config: the model's, with as many labels as the task has outputs.
        task: what is learnt.
    """

    coefficients: tuple[float, ...] = (1.0,)
    rates: Mapping[str, PartRate] = {}

    def __init__(self, config: ModelConfig, task: Task) -> None:
        self.task = task
        self._config = config
        self._abstract = abstract_model(config, CLASSIFIER)

    def shapes(self) -> Params:
        """The model's parameters, without values."""
        return params_of(self._abstract)

    def start(self, key: Array, base: Any) -> Params:
        """Fresh parameters, or those of a base model.

        That is a classifier, whose head is left behind where it has another number of labels, or a language model.
        """
        fresh = new_params(self._config, key, purpose=CLASSIFIER)
        if base is None:
            return fresh
        given = params_of(base)
        orders = mixer_order(self._config), mixer_order(base.config)
        if isinstance(base, CausalModel):
            own = {name: part for name, part in given.items() if name in fresh[_BODY]}
            return {**fresh, _BODY: initial_params(fresh[_BODY], own, orders=orders)}
        flat, wanted = flatten_dict(given), flatten_dict(fresh)
        for path in self._label_paths() & flat.keys():
            if flat[path].shape != wanted[path].shape:
                flat[path] = wanted[path]
        return initial_params(fresh, unflatten_dict(flat), orders=orders)

    def frozen(self, base: Any) -> Params:
        """None: a base model's parameters go on learning."""
        return {}

    def modules(self) -> Sequence[Any]:
        """The model."""
        return [self._abstract]

    def parts(self, params: Params, frozen: Params) -> tuple[Any, None]:
        """The model, and no heads."""
        return filled(self._abstract, params), None

    def counts(self, batch: Batch) -> Int[Array, "1"]:
        """Texts of a batch."""
        return jnp.sum(_included(batch))[None]

    def sums(self, params: Params, frozen: Params, batch: Batch) -> Sums | Answers:
        """Sums `[1]` over the texts of a batch; of a batch to validate on, what was said of each, too."""
        model, _ = self.parts(params, frozen)
        scores = model(*(batch[name] for name in _INPUTS if name in batch))
        labels, included = jnp.asarray(batch["labels"]), _included(batch)
        if self.task.is_regression:
            losses, hits = jnp.square(scores[:, 0] - labels), jnp.zeros_like(included)
        else:
            right = jnp.take_along_axis(scores, labels[:, None], axis=-1)[:, 0]
            losses = jax.nn.logsumexp(scores, axis=-1) - right
            hits = (jnp.argmax(scores, axis=-1) == labels) & included
        each = (jnp.where(included, losses, 0), hits, included)
        loss, correct, texts = (jnp.sum(part)[None] for part in each)
        if "split" not in batch:
            return Sums(loss, correct, texts)
        return Answers(loss, correct, texts, scores, labels, jnp.asarray(batch["split"]))

    def figures(self, sums: Sums | Answers) -> dict[str, float]:
        """The task's metrics on every set; of training batches the accuracy, if there are classes."""
        if isinstance(sums, Answers):
            return {
                name + (each.name and f"_{each.name}"): value
                for part, each in enumerate(self.task.held_out)
                for name, value in scored(*sums.of(part), self.task.metrics).items()
            }
        if self.task.is_regression:
            return {}
        return {"accuracy": float(sums.correct[0]) / max(int(sums.tokens[0]), 1)}

    def report(self, params: Params, frozen: Params, batches: Sequence[Batch], folder: Path | None) -> str:
        """The metrics on every set, and how often each class was taken for each: as `glue.json` and as a table."""
        compiled = jax.jit(self.sums)
        answers = sum_over_batches(lambda batch: compiled(params, frozen, batch), batches)
        sets = {
            each.name or "validation": self._described(*answers.of(part))
            for part, each in enumerate(self.task.held_out)
        }
        lines = [f"{self.task.name}:"]
        if folder is not None:
            path = folder / REPORT_FILE
            path.write_text(json.dumps({"task": self.task.name, "sets": sets}, indent=2) + "\n")
            lines = [f"{self.task.name} ({path}):"]
        for name, found in sets.items():
            figures = {**found["metrics"], **({"majority": found["majority"]} if "majority" in found else {})}
            shown = "".join(f"{f'{what} {value:.4f}':>20}" for what, value in figures.items())
            lines.append(f"{name:<12}{found['texts']:>7} texts{shown}")
        return "\n".join(lines)

    def _described(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """Formats the report of one set. `majority` is the accuracy of always saying the commonest class."""
        found: dict[str, Any] = {"texts": len(labels), "metrics": scored(scores, labels, self.task.metrics)}
        if self.task.is_regression:
            return found
        counts = confusion(labels, np.argmax(scores, axis=-1), self.task.outputs)
        return {
            **found,
            "majority": float(counts.sum(axis=1).max() / max(len(labels), 1)),
            "labels": list(self.task.labels),
            "confusion": counts.tolist(),
        }

    def _label_paths(self) -> set[tuple[Any, ...]]:
        """Paths of the parameters whose shapes depend on how many labels there are."""
        config: Any = self._config
        more = replace(config, num_labels=self.task.outputs + 1)
        there, here = (
            {path: value.shape for path, value in flatten_dict(params_of(model)).items()}
            for model in (abstract_model(more, CLASSIFIER), self._abstract)
        )
        return {path for path, shape in here.items() if there[path] != shape}


def _included(batch: Batch) -> Array:
    """Marks the rows `[B]` that are texts: all, or those that are of a set."""
    split = batch.get("split")
    return jnp.ones(batch["labels"].shape, bool) if split is None else jnp.asarray(split) >= 0
