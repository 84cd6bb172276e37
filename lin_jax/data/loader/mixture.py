"""Rows of several sources in fixed proportions."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import grain

from lin_jax.data.loader.clock import SourceClock
from lin_jax.data.types import Row


class MixtureSource(NamedTuple):
    """Endless rows of one source.

    Attributes:
        name: of the source.
        share: its share of the mixture; those of all sources add up to 1.
        rows: the rows.
    """

    name: str
    share: float
    rows: grain.IterDataset


class MixedRows(grain.IterDataset):
    """Rows of all sources by their shares: not drawn at random, but spread as evenly as possible.

    Args:
        sources: the sources to mix.
        clock: times each source.
    """

    def __init__(self, sources: Sequence[MixtureSource], clock: SourceClock) -> None:
        super().__init__([source.rows for source in sources])
        self._sources = tuple(sources)
        self._clock = clock

    def __iter__(self) -> "_MixedIterator":
        return _MixedIterator(self._sources, self._clock)


class _MixedIterator(grain.DatasetIterator):
    """An iterator whose state is the number of rows taken from each source, and the states of the sources."""

    def __init__(self, sources: Sequence[MixtureSource], clock: SourceClock) -> None:
        super().__init__([source.rows.__iter__() for source in sources])
        self._names = [source.name for source in sources]
        self._shares = [source.share for source in sources]
        self._taken = [0] * len(sources)
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
    """Index of the source that lacks most of its share when one more row is taken; the first of equals."""
    total = sum(taken) + 1
    return max(range(len(taken)), key=lambda number: shares[number] * total - taken[number])
