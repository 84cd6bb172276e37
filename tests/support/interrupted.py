"""Runs that are stopped at a step, and what they wrote."""

import signal
from contextlib import contextmanager

from lin_jax.training.monitoring.throughput import MACHINE_FIGURES
from lin_jax.training.monitoring.trackers import read_metrics
from lin_jax.training.train_step import make_step


@contextmanager
def stopping_after(steps, monkeypatch):
    """Runs get a SIGTERM while they take the given step."""

    def make(*arguments, **options):
        step = make_step(*arguments, **options)

        class Counted:
            def lower(self, *given):
                compiled = step.lower(*given).compile()
                taken = []

                def call(*given):
                    taken.append(None)
                    if len(taken) == steps:
                        signal.raise_signal(signal.SIGTERM)
                    return compiled(*given)

                self.compile = lambda: call
                return self

        return Counted()

    with monkeypatch.context() as patch:
        patch.setattr("lin_jax.training.setup.make_step", make)
        yield


def lines_of(folder):
    return [
        {name: line[name] for name in line.keys() - MACHINE_FIGURES} for line in read_metrics(folder / "metrics.jsonl")
    ]
