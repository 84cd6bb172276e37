"""Rows of several sources in fixed proportions, and which of the sources the reader is waiting for."""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import grain
import numpy as np

Row = dict[str, np.ndarray]


class SourceClock:
    """Which source is being read, and which one took longest lately.

    One thread reads; any thread may look at `current`.

    Args:
        first: The name to begin with.
    """

    def __init__(self, first: str) -> None:
        self.current: str | None = None
        self._slowest = first
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """Measures how long a source is read."""
        self.current, began = name, time.monotonic()
        try:
            yield
        finally:
            self._seconds[name] += time.monotonic() - began
            self.current = None

    def lap(self) -> str:
        """Returns the source that took longest since the last lap; the same as then if none was read."""
        if self._seconds:
            self._slowest = max(self._seconds, key=self._seconds.__getitem__)
            self._seconds.clear()
        return self._slowest


class Ingredient(NamedTuple):
    """Endless rows of one source.

    Attributes:
        name: Of the source.
        share: Its share of the mixture; those of all ingredients add up to 1.
        rows: The rows.
    """

    name: str
    share: float
    rows: grain.IterDataset


class MixedRows(grain.IterDataset):
    """Rows of all ingredients, each as often as its share says: not by chance, but as evenly as can be.

    Args:
        ingredients: What to mix.
        clock: Is told which one is being read.
    """

    def __init__(self, ingredients: Sequence[Ingredient], clock: SourceClock) -> None:
        super().__init__([each.rows for each in ingredients])
        self._ingredients = tuple(ingredients)
        self._clock = clock

    def __iter__(self) -> "_MixedIterator":
        return _MixedIterator(self._ingredients, self._clock)


class _MixedIterator(grain.DatasetIterator):
    """Its state is how many rows were taken of each ingredient, and the states of those."""

    def __init__(self, ingredients: Sequence[Ingredient], clock: SourceClock) -> None:
        super().__init__([each.rows.__iter__() for each in ingredients])
        self._names = [each.name for each in ingredients]
        self._shares = [each.share for each in ingredients]
        self._taken = [0] * len(ingredients)
        self._clock = clock

    def __next__(self) -> Row:
        number = furthest_behind(self._taken, self._shares)
        with self._clock.reading(self._names[number]):
            row = next(self._parents[number])
        self._taken[number] += 1
        return row

    def get_state(self) -> dict[str, Any]:
        return {"taken": list(self._taken), "parts": [parent.get_state() for parent in self._parents]}

    def set_state(self, state: dict[str, Any]) -> None:
        self._taken = list(state["taken"])
        for parent, each in zip(self._parents, state["parts"], strict=True):
            parent.set_state(each)


def furthest_behind(taken: Sequence[int], shares: Sequence[float]) -> int:
    """Which of several lacks most of its share when one more is taken; the first of equals."""
    total = sum(taken) + 1
    return max(range(len(taken)), key=lambda number: shares[number] * total - taken[number])
