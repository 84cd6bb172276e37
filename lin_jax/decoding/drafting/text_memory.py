"""Memory of the texts of a session, from which drafters copy; bounded, the oldest are forgotten."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from flax import nnx

from lin_jax.decoding.drafting.suffix_index import MAX_MATCH, build_index
from lin_jax.errors import UserError

# Tokens that are kept; eight bytes each on the device.
MEMORY_TOKENS = 2**16
# Largest memory whose places and match lengths fit into one 32-bit key.
LARGEST_MEMORY = 2**25
# Texts are sorted in as soon as they are this share of what is remembered, and at least so many tokens.
_PENDING_SHARE, _PENDING_TOKENS = 1 / 8, 512
# Between two calls all of a memory of up to so many tokens is sorted anew, which takes milliseconds; of a larger one
# only if so large a share is new.
_QUICK_TOKENS, _QUICK_SHARE = 2**14, 1 / 16
# Tokens of the contexts that the host looks up: some that make a copy worth a try, and many, which leave little doubt.
SHORT, LONG = 3, 16
# Followers of a place that are enough: the latest place with fewer is found only where no other has the same context.
_ENOUGH = 32


class Contexts(NamedTuple):
    """The sorted texts on the host, and places in them by the tokens before, whose bytes are the keys.

    Attributes:
        tokens: the texts, with -1 after each.
        short: place of the last token of an occurrence of every `SHORT` tokens that another one follows.
        long: the same of every `LONG` tokens.
        beginnings: the same of the first tokens of every text, as many as there are, below `LONG`.
    """

    tokens: list[int]
    short: dict[bytes, int]
    long: dict[bytes, int]
    beginnings: dict[bytes, int]

    def add(self, text: bytes) -> None:
        """Adds a text behind the others."""
        width, first = np.dtype(np.int32).itemsize, len(self.tokens)
        tokens = np.frombuffer(text, np.int32).tolist()
        self.tokens.extend([*tokens, -1])
        for end in range(1, min(LONG, len(tokens))):
            self.beginnings[text[: end * width]] = first + end - 1
        for size, places in ((SHORT, self.short), (LONG, self.long)):
            for end in range(size, len(tokens)):
                context = text[(end - size) * width : end * width]
                if len(tokens) - end >= _ENOUGH:
                    places[context] = first + end - 1
                else:
                    places.setdefault(context, first + end - 1)


class TextMemory:
    """Texts of a session, the newest last, at most `limit` tokens of them, each text counted with one more for its end.

    Added texts are found after the next `refresh`; when they are an eighth of all they are sorted in on the way, so
    that sorting stays a small part of the work. A text that begins with an older one takes its place, as the same text
    again does. Contents and order follow from the added texts alone.

    Args:
        limit: number of tokens to keep.

    Attributes:
        index: the sorted texts, a `SuffixIndex`; drafters that were built with this memory share it.

    Raises:
        UserError: the limit is out of range.
    """

    def __init__(self, limit: int = MEMORY_TOKENS) -> None:
        if not MAX_MATCH <= limit <= LARGEST_MEMORY:
            raise UserError(f"a memory of {limit} tokens is not possible; give {MAX_MATCH} to {LARGEST_MEMORY}")
        self.limit = limit
        # Bytes of 32-bit tokens, in order; quick to compare.
        self._texts: dict[bytes, None] = {}
        self._size = self._pending = 0
        self._sorted: list[bytes] = []
        self._contexts = Contexts([], {}, {}, {})
        self._listed: list[bytes] = []
        self.index = nnx.Variable(build_index([], limit))

    @property
    def size(self) -> int:
        """Number of tokens in memory, with one more for the end of each text."""
        return self._size

    @property
    def texts(self) -> list[list[int]]:
        """Texts in memory, the oldest first."""
        return [text.tolist() for text in self._arrays()]

    def add(self, tokens: Sequence[int]) -> bool:
        """Remembers a text, of which only the last `limit - 1` tokens are kept; the oldest texts make room.

        Returns:
            True if the index is another one now.
        """
        text = np.asarray(tokens, np.int32)[-(self.limit - 1) :]
        if not text.size:
            return False
        new = text.tobytes()
        for replaced in [old for old in self._texts if new.startswith(old)]:
            self._forget(replaced)
        self._texts[new] = None
        self._size += text.size + 1
        while self._size > self.limit:
            self._forget(next(iter(self._texts)))
        self._pending += text.size
        full = self._pending >= max(_PENDING_TOKENS, _PENDING_SHARE * self._size)
        if full:
            self.refresh()
        return full

    def refresh(self, *, cheaply: bool = False) -> None:
        """Sorts in the texts that were added since the last time.

        Args:
            cheaply: leave it where sorting would take long beside what is new.
        """
        dear = self._size > _QUICK_TOKENS and self._pending < _QUICK_SHARE * self._size
        if self._pending and not (cheaply and dear):
            self.index.set_value(build_index(self._arrays(), self.limit))
            self._pending = 0
            self._sorted = list(self._texts)

    @property
    def contexts(self) -> Contexts:
        """The sorted texts on the host, where a single context is found sooner than on the device."""
        # Asked for with every token of a text: the same list is not compared text by text.
        if self._listed is not self._sorted and self._listed != self._sorted:
            # Mostly there are only new ones.
            if self._listed != self._sorted[: len(self._listed)]:
                self._contexts, self._listed = Contexts([], {}, {}, {}), []
            for text in self._sorted[len(self._listed) :]:
                self._contexts.add(text)
            self._listed = self._sorted
        return self._contexts

    def _arrays(self) -> list[np.ndarray]:
        return [np.frombuffer(text, np.int32) for text in self._texts]

    def _forget(self, text: bytes) -> None:
        del self._texts[text]
        self._size -= len(text) // np.dtype(np.int32).itemsize + 1
