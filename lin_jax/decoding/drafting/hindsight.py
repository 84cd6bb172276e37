"""Guesses of lookup drafters in hindsight: what copies of earlier text would have given, counted on the host."""

from array import array
from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple, Protocol, runtime_checkable

from lin_jax.decoding.drafting.api import Drafter
from lin_jax.decoding.drafting.suffix_index import MAX_MATCH
from lin_jax.decoding.drafting.text_memory import LONG, SHORT, TextMemory

# Bits of a token in the number that stands for an n-gram.
_DIGIT = 32
# Tokens that follow a passage of a memory without a gap, as many as come at a time: more than between two syncs.
_READ_AT_ONCE = 2048


class CopyTrial(NamedTuple):
    """One copied token and the one that the text has.

    Attributes:
        matched: tokens before it that agree with the place that it is copied from.
        right: True if it is the token of the text.
    """

    matched: int
    right: bool


class Hindsight(Protocol):
    """Follows one text, and tells how many guesses of its drafter would have been accepted.

    Attributes:
        trials: every copied token of the last `push`.
        longest: longest n-gram that is looked up in the text itself; 0 for none.
    """

    trials: list[CopyTrial]
    longest: int

    @property
    def matched(self) -> int:
        """Last tokens that agree with the place from which the next guesses are copied; 0 where there are none."""

    @property
    def idle(self) -> bool:
        """True where there is nothing to copy from but the text itself."""

    def push(self, tokens: Sequence[int]) -> list[int]:
        """Reads tokens; gives the number of accepted guesses of every step that they complete."""


@runtime_checkable
class Retrospective(Drafter, Protocol):
    """Drafter whose guesses depend on the text alone, so that the host can tell at no cost how good they are."""

    def hindsight(self, depth: int) -> Hindsight:
        """Begins to follow a text, with guesses up to a depth."""


class LookupHindsight:
    """Prompt lookup on the host: copies what followed the last occurrence of the longest known n-gram.

    Args:
        depth: tokens to copy.
        longest: longest n-gram.
        lookback: number of last tokens that are searched.
    """

    def __init__(self, depth: int, longest: int, lookback: int) -> None:
        self.depth, self.longest, self.lookback = depth, longest, lookback
        self.text: list[int] = []
        # Place of the last token of the last occurrence of every n-gram, whose tokens are digits of a number.
        self.ends: dict[int, int] = {}
        self.accepted = 0
        self.trials: list[CopyTrial] = []
        # Tokens before the guesses that agree with those before the place that they are copied from.
        self.agreeing = 0
        # What is copied, the place of the first guess, after how many guesses they begin again (0: never), and how
        # many there are at most: each is looked up when its token comes, as most never do.
        self._copied: list[int] = []
        self._begin = self._period = self._most = 0
        # The n-grams of 0, 1, ... tokens at the end of the text, and size and place of the longest known one.
        self._grams: list[int] = [0] if longest else []
        self._size, self._end = 0, -1

    @property
    def matched(self) -> int:
        """Last tokens that agree with the place from which the next guesses are copied; 0 where there are none."""
        goes_on = self._most > 0 and (self.accepted == self._most or self._guess(self.accepted) >= 0)
        return self.agreeing + self.accepted if goes_on else 0

    @property
    def idle(self) -> bool:
        """True: it copies from the text itself alone."""
        return True

    @property
    def guesses(self) -> list[int]:
        """Guesses of the step that is not complete yet, those that were right included."""
        return list(takewhile(lambda token: token >= 0, map(self._guess, range(self._most))))

    def push(self, tokens: Sequence[int]) -> list[int]:
        """Reads tokens; gives the number of accepted guesses of every step that they complete."""
        done = []
        self.trials = []
        for token in map(int, tokens[-self.lookback :]):
            guess = self._guess(self.accepted)
            if guess >= 0:
                self.trials.append(CopyTrial(self.agreeing + self.accepted, guess == token))
                if guess == token:
                    self.accepted += 1
                    self._append(token)
                    continue
            # The target's own token ends a step, and is the root of the next one.
            if self.text:
                done.append(self.accepted)
            self._append(token)
            self._copied, self._begin, self._period, self._most = self._copy()
            self.accepted = 0
        return done

    def _guess(self, number: int) -> int:
        """Guess of a number, counted from 0; -1 for none."""
        if number >= self._most:
            return -1
        place = self._begin + (number % self._period if self._period else number)
        return self._copied[place] if place < len(self._copied) else -1

    def _append(self, token: int) -> None:
        """Appends a token, and finds the longest n-gram at the end of the text that was there before."""
        if len(self.text) >= 2 * self.lookback:
            kept, self.text, self.ends, self._grams = self.text[-self.lookback :], [], {}, self._grams[:1]
            for each in kept:
                self._append(each)
        self.text.append(token)
        last, grams = len(self.text) - 1, [0]
        self._size = 0
        for size, before in enumerate(self._grams, 1):
            gram = (before << _DIGIT) + token + 1
            end = self.ends.get(gram, -1)
            if end >= 0 and last - end < self.lookback:
                self._size, self._end = size, end
            self.ends[gram] = last
            grams.append(gram)
        self._grams = grams[: self.longest]

    def _copy(self) -> tuple[list[int], int, int, int]:
        """Tokens that followed the last occurrence of the end of the text, over and over if they lead up to it."""
        if not self._size:
            return [], 0, 0, 0
        last, end, self.agreeing = len(self.text) - 1, self._end, self._size
        while self.agreeing < min(MAX_MATCH, end + 1) and (
            self.text[end - self.agreeing] == self.text[last - self.agreeing]
        ):
            self.agreeing += 1
        return self.text, end + 1, last - end, self.depth


class MemoryHindsight(LookupHindsight):
    """Copies of earlier texts on the host: goes on in the text that it follows, else where the context is the same.

    Drafters on the device find the longest match, and may let several vote; this one tells nearly as much at no cost.

    Args:
        depth: tokens to copy.
        memory: the earlier texts.
        longest: longest n-gram of the text itself to look up where the memory has nothing; 0 leaves the text itself to
            another drafter.
        lookback: number of last tokens of the text itself that are searched.
    """

    def __init__(self, depth: int, memory: TextMemory, longest: int, lookback: int) -> None:
        # A passage is followed token by token: none may be left out, however few the drafter looks at.
        super().__init__(depth, longest, max(lookback, _READ_AT_ONCE))
        self.memory = memory
        # Place in the memory of the token before the guesses, and the texts that it is a place of.
        self.followed = -1
        self.texts: list[int] = []

    @property
    def idle(self) -> bool:
        """True as long as the memory is empty."""
        return not self.memory.contexts.tokens

    def push(self, tokens: Sequence[int]) -> list[int]:
        """Reads tokens; gives the number of accepted guesses of every step that they complete."""
        if self.longest or not self.idle:
            return super().push(tokens)
        # Nothing can be copied, and nothing is to be learned from that.
        self.trials, self.accepted, self.agreeing, self.followed, self._most = [], 0, 0, -1, 0
        done = [0] * (len(tokens[-self.lookback :]) - (not self.text))
        self.text = [*self.text, *map(int, tokens[-self.lookback :])][-self.lookback :]
        return done

    def _copy(self) -> tuple[list[int], int, int, int]:
        """Tokens that followed in the memory, or else in the text itself."""
        tokens = self.memory.contexts.tokens
        on = self.followed + self.accepted + 1
        goes_on = self.followed >= 0 and self.texts is tokens and on < len(tokens) and tokens[on] == self.text[-1]
        self.agreeing = self.agreeing + self.accepted + 1 if goes_on else 0
        self.followed, self.texts = on if goes_on else -1, tokens
        if tokens and self.agreeing < LONG:
            self._look_up()
        if self.followed >= 0:
            begin = self.followed + 1
            if begin < len(tokens) and tokens[begin] >= 0:
                return tokens, begin, 0, self.depth
            self.followed = -1
        return super()._copy() if self.longest else ([], 0, 0, 0)

    def _look_up(self) -> None:
        """Finds another place with a long context, or, where none is followed, with a short one."""
        contexts, last = self.memory.contexts, array("i", self.text[-LONG:])
        whole = len(self.text) < LONG
        place = (contexts.beginnings if whole else contexts.long).get(last.tobytes(), -1)
        if place >= 0:
            self.followed, self.agreeing = place, LONG
        elif self.followed < 0:
            self.followed, self.agreeing = contexts.short.get(last[-SHORT:].tobytes(), -1), SHORT
