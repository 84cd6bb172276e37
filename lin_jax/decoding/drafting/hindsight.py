"""Guesses of lookup drafters in hindsight: what copies of earlier text would have given, counted on the host."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from lin_jax.decoding.drafting.api import Drafter
from lin_jax.decoding.drafting.text_memory import CONTEXT, TextMemory


class Hindsight(Protocol):
    """Follows one text, and tells how many guesses of its drafter would have been accepted."""

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
        self.ends: dict[tuple[int, ...], int] = {}
        self.guesses: list[int] = []
        self.accepted = 0

    def push(self, tokens: Sequence[int]) -> list[int]:
        """Reads tokens; gives the number of accepted guesses of every step that they complete."""
        done = []
        for token in tokens[-self.lookback :]:
            if self.accepted < len(self.guesses) and self.guesses[self.accepted] == token:
                self.accepted += 1
                self._append(token)
                continue
            # The target's own token ends a step, and is the root of the next one.
            if self.text:
                done.append(self.accepted)
            self.text.append(token)
            self.guesses, self.accepted = self._copy(), 0
            self.text.pop()
            self._append(token)
        return done

    def _append(self, token: int) -> None:
        if len(self.text) >= 2 * self.lookback:
            kept, self.text, self.ends = self.text[-self.lookback :], [], {}
            for each in kept:
                self._append(each)
        self.text.append(token)
        for size in range(1, min(self.longest, len(self.text)) + 1):
            self.ends[tuple(self.text[-size:])] = len(self.text) - 1

    def _copy(self) -> list[int]:
        """Tokens that followed the last occurrence of the end of the text, over and over if they lead up to it."""
        last = len(self.text) - 1
        for size in range(min(self.longest, len(self.text)), 0, -1):
            end = self.ends.get(tuple(self.text[-size:]))
            if end is not None and last - end < self.lookback:
                return [self.text[end + 1 + place % (last - end)] for place in range(self.depth)]
        return []


class MemoryHindsight(LookupHindsight):
    """Copies of earlier texts on the host: goes on in the text that it follows, else at the latest equal context.

    The suffix drafter finds the longest match, and lets several vote; this one tells nearly as much at no cost.

    Args:
        depth: tokens to copy.
        memory: the earlier texts.
        longest: longest n-gram of the text itself to look up where the memory has nothing; 0 leaves the text itself to
            another drafter.
        lookback: number of last tokens of the text itself that are searched.
    """

    def __init__(self, depth: int, memory: TextMemory, longest: int, lookback: int) -> None:
        super().__init__(depth, longest, lookback)
        self.memory = memory
        # Place in the memory of the token before the guesses, and the texts that it is a place of.
        self.followed = -1
        self.texts: list[int] = []

    def _copy(self) -> list[int]:
        """Tokens that followed in the memory, or else in the text itself."""
        tokens, ends = self.memory.contexts
        on = self.followed + self.accepted + 1
        goes_on = self.followed >= 0 and self.texts is tokens and on < len(tokens) and tokens[on] == self.text[-1]
        self.followed = on if goes_on else ends.get(tuple(self.text[-CONTEXT:]), -1)
        self.texts = tokens
        if self.followed >= 0:
            guesses = tokens[self.followed + 1 : self.followed + 1 + self.depth]
            if guesses and guesses[0] >= 0:
                return guesses[: guesses.index(-1)] if -1 in guesses else guesses
            self.followed = -1
        return super()._copy() if self.longest else []
