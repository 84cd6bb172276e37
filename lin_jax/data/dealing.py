"""Documents in memory in random order, over and over, dealt to shards."""

from functools import lru_cache
from typing import Any, Protocol

import grain
import numpy as np


class Tokens(Protocol):
    """Random access to tokens, `{"tokens": int32 [N]}`: a document, or a piece of a long one, at each place.

    Attributes:
        fingerprint: Stands for all texts in their order.
    """

    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...


def random_order(size: int, *seed: int) -> np.ndarray:
    """A permutation `[size]` that is the same for the same numbers.

    It is made of a generator's raw numbers, which are the same in every version of NumPy, as its permutations need not
    be. Grain's `index_shuffle` needs no memory, but long for each number where there are few to shuffle.
    """
    chance = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(size)
    return np.argsort(chance, kind="stable")


class Deck:
    """Documents that every shard takes its own of, in an order that is new in every epoch.

    Shuffled before they are dealt, so that a shard has other documents in every epoch.

    Args:
        tokens: Of the documents.
        seed: Decides the orders.
        shards: How many shards there are; at most as many as documents.
    """

    def __init__(self, tokens: Tokens, seed: int, shards: int) -> None:
        self.tokens = tokens
        self._shards = shards
        # Shards reach the next epoch one after another.
        self._order = lru_cache(maxsize=2)(lambda epoch: random_order(len(tokens), seed, epoch))

    def hand(self, shard: int, epoch: int) -> np.ndarray:
        """The places of the documents of a shard in an epoch, in order."""
        return self._order(epoch)[shard :: self._shards]


class DealtDocuments(grain.IterDataset):
    """The documents of one shard, epoch after epoch, as `{"tokens": int32 [N]}`.

    Args:
        deck: Of all documents.
        shard: Which shard.
    """

    def __init__(self, deck: Deck, shard: int) -> None:
        super().__init__()
        self._deck = deck
        self._shard = shard

    def __iter__(self) -> "_DealtIterator":
        return _DealtIterator(self._deck, self._shard)


class _DealtIterator(grain.DatasetIterator):
    """Its state is the epoch, and how many of its documents were taken."""

    def __init__(self, deck: Deck, shard: int) -> None:
        super().__init__()
        self._deck = deck
        self._shard = shard
        self._epoch = self._taken = 0

    def __next__(self) -> dict[str, np.ndarray]:
        hand = self._deck.hand(self._shard, self._epoch)
        if self._taken == len(hand):
            self._epoch, self._taken = self._epoch + 1, 0
            hand = self._deck.hand(self._shard, self._epoch)
        self._taken += 1
        return self._deck.tokens[int(hand[self._taken - 1])]

    def get_state(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "taken": self._taken}

    def set_state(self, state: dict[str, Any]) -> None:
        self._epoch, self._taken = state["epoch"], state["taken"]
