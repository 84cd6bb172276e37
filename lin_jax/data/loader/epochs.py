"""Shuffled epochs over documents in memory, distributed over shards."""

from functools import lru_cache
from typing import Any

import grain
import numpy as np

from lin_jax.data.types import TokenSource


def random_order(size: int, *seed: int) -> np.ndarray:
    """A permutation `[size]` that is the same for the same numbers.

    It is made of a generator's raw numbers, which are the same in every version of NumPy, as its permutations need not
    be. Grain's `index_shuffle` needs no memory, but takes long for each index of a small range.
    """
    chance = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(size)
    return np.argsort(chance, kind="stable")


class EpochShuffle:
    """Order of the documents of every shard, new in every epoch.

    Documents are shuffled before they are distributed, so that a shard has other documents in every epoch.

    Args:
        tokens: of the documents.
        seed: decides the orders.
        shards: number of shards; at most as many as documents.
    """

    def __init__(self, tokens: TokenSource, seed: int, shards: int) -> None:
        self.tokens = tokens
        self._shards = shards
        # Shards reach the next epoch one after another.
        self._order = lru_cache(maxsize=2)(lambda epoch: random_order(len(tokens), seed, epoch))

    def shard_order(self, shard: int, epoch: int) -> np.ndarray:
        """Indices of the documents of a shard in an epoch, in order."""
        return self._order(epoch)[shard :: self._shards]


class EpochDocuments(grain.IterDataset):
    """The documents of one shard, epoch after epoch, as `{"tokens": int32 [N]}`.

    Args:
        shuffle: of all documents.
        shard: index of the shard.
    """

    def __init__(self, shuffle: EpochShuffle, shard: int) -> None:
        super().__init__()
        self._shuffle = shuffle
        self._shard = shard

    def __iter__(self) -> "_EpochIterator":
        return _EpochIterator(self._shuffle, self._shard)


class _EpochIterator(grain.DatasetIterator):
    """An iterator whose state is the epoch, and the number of its documents that were taken."""

    def __init__(self, shuffle: EpochShuffle, shard: int) -> None:
        super().__init__()
        self._shuffle = shuffle
        self._shard = shard
        self._epoch = self._taken = 0

    def __next__(self) -> dict[str, np.ndarray]:
        order = self._shuffle.shard_order(self._shard, self._epoch)
        if self._taken == len(order):
            self._epoch, self._taken = self._epoch + 1, 0
            order = self._shuffle.shard_order(self._shard, self._epoch)
        self._taken += 1
        return self._shuffle.tokens[int(order[self._taken - 1])]

    def get_state(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "taken": self._taken}

    def set_state(self, state: dict[str, Any]) -> None:
        self._epoch, self._taken = state["epoch"], state["taken"]
