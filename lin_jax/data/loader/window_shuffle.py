"""Rows shuffled within windows, since neighbouring rows mostly come from one long document."""

import copy
from typing import Any

import grain

from lin_jax.data.loader.epochs import random_order
from lin_jax.data.types import Row


class ShuffledWindows(grain.IterDataset):
    """Shuffles endless rows, one window of them at a time.

    Args:
        rows: the rows.
        size: rows of a window.
        seed: numbers that decide the orders; every window has one of its own.
    """

    def __init__(self, rows: grain.IterDataset, size: int, seed: tuple[int, ...]) -> None:
        super().__init__(rows)
        self._size = size
        self._seed = seed

    def __iter__(self) -> "_WindowIterator":
        return _WindowIterator(self._parent.__iter__(), self._size, self._seed)


class _WindowIterator(grain.DatasetIterator):
    """An iterator whose state is that of the rows at the window's begin, the window's number, and the rows returned."""

    def __init__(self, rows: grain.DatasetIterator, size: int, seed: tuple[int, ...]) -> None:
        super().__init__(rows)
        self._size = size
        self._seed = seed
        self._number = -1
        self._given = size
        self._begin = rows.get_state()
        self._window: list[Row] = []

    def __next__(self) -> Row:
        if self._given == self._size:
            begin = self._parent.get_state()
            self._window = self._read(self._number + 1)
            self._begin, self._number, self._given = begin, self._number + 1, 0
        row = self._window[self._given]
        self._given += 1
        return row

    def get_state(self) -> dict[str, Any]:
        return {"begin": copy.deepcopy(self._begin), "number": self._number, "given": self._given}

    def set_state(self, state: dict[str, Any]) -> None:
        self._begin, self._number, self._given = copy.deepcopy(state["begin"]), state["number"], state["given"]
        self._parent.set_state(copy.deepcopy(state["begin"]))
        self._window = self._read(self._number) if self._number >= 0 else []

    def _read(self, number: int) -> list[Row]:
        rows = [next(self._parent) for _ in range(self._size)]
        return [rows[index] for index in random_order(self._size, *self._seed, number)]
