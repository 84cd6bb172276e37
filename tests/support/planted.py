"""Runs with trouble planted in them: batches whose losses are multiplied by something."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from lin_jax.training.monitoring.throughput import MACHINE_FIGURES
from lin_jax.training.monitoring.trackers import read_metrics
from lin_jax.training.objectives import NextToken
from lin_jax.training.objectives.registry import OBJECTIVES
from lin_jax.training.setup import resolve


class Scaled(NextToken):
    """Its loss is multiplied by what a batch says."""

    def sums(self, params, frozen, batch):
        sums = super().sums(params, frozen, batch)
        return sums._replace(loss=sums.loss * batch["factor"][0]) if "factor" in batch else sums


class Planted:
    """Batches with a factor each, 1 where the plan (by number, from 1) has no other; `before(number)` is called."""

    def __init__(self, batches, plan, before):
        self.batches, self.plan, self.before, self.number = batches, plan, before, 0

    def __next__(self):
        self.number += 1
        self.before(self.number)
        batch = next(self.batches)
        factor = self.plan.get(self.number, 1.0)
        return {**batch, "factor": np.full(len(batch["tokens"]), factor, np.float32)}

    def get_state(self):
        state = self.batches.get_state()
        return {**state, "identity": {**state["identity"], "number": self.number}}

    def set_state(self, state):
        self.number = state["identity"]["number"]
        self.batches.set_state(state)


@contextmanager
def planted(plan, before=lambda number: None):
    """Inside, runs of a language model have trouble."""

    def resolve_planted(config, *, resume):
        run = resolve(config, resume=resume)
        return replace(run, batches=Planted(run.batches, plan, before))

    with pytest.MonkeyPatch.context() as patch:
        kind = replace(OBJECTIVES["language_model"], build=lambda config: Scaled(config.model, config.adapters))
        patch.setitem(OBJECTIVES, "language_model", kind)
        patch.setattr("lin_jax.training.run.resolve", resolve_planted)
        yield resolve_planted


class Killed(BaseException):
    """Ends a run as nothing that it expects."""


def killed_at(number):
    """Kills a run when it asks for that batch."""

    def before(asked):
        if asked == number:
            raise Killed

    return before


def lines_of(folder):
    """The metrics of a run but for those of the machine; a list of sorted pairs each."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [sorted((name, value) for name, value in line.items() if name not in MACHINE_FIGURES) for line in lines]
