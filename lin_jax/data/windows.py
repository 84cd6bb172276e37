"""Rows in random order within windows: neighbours, which mostly come from one long document, are parted."""

import copy
from typing import Any

import grain

from lin_jax.data.dealing import random_order
from lin_jax.data.mixing import Row


class ShuffledWindows(grain.IterDataset):
    """Takes a window of endless rows at a time, and gives them out in random order.

    Args:
        rows: The rows.
        size: How many to a window.
        seed: Numbers that decide the order; every window has one of its own.
    """

    def __init__(self, rows: grain.IterDataset, size: int, seed: tuple[int, ...]) -> None:
        super().__init__(rows)
        self._size = size
        self._seed = seed

    def __iter__(self) -> "_WindowIterator":
        return _WindowIterator(self._parent.__iter__(), self._size, self._seed)


class _WindowIterator(grain.DatasetIterator):
    """Its state is that of the rows where the window begins, the number of the window, and how many were given out."""

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
