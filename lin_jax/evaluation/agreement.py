"""Agreement of two models that each continue the same prompts on their own, token by token."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median


@dataclass(frozen=True)
class Agreement:
    """Agreement of a student's continuations with its teacher's.

    Both are greedy and free-running: after the first difference each goes on from its own text, so that a token is
    equal later only where the texts come together again, at the same place.

    Attributes:
        equal: share of the teacher's tokens at whose place the student has the same one.
        identical: share of the continuations that are the same to the end.
        first_difference: median over the continuations of the tokens before the first difference; all of them where
            there is none.
        mean_first_difference: their mean.
        tokens: how many tokens of the teacher's were compared.
    """

    equal: float
    identical: float
    first_difference: float
    mean_first_difference: float
    tokens: int


def agreement(teacher: Sequence[Sequence[int]], student: Sequence[Sequence[int]]) -> Agreement:
    """Compares continuations of the same prompts; where the student ended earlier, its tokens count as different.

    Args:
        teacher: the teacher's continuations, each up to its end.
        student: the student's.
    """
    pairs = list(zip(teacher, student, strict=True))
    hits = sum(sum(map(int.__eq__, expected, found)) for expected, found in pairs)
    tokens = sum(len(expected) for expected, _ in pairs)
    before = [_equal_tokens(expected, found) for expected, found in pairs]
    same = sum(length == len(expected) for length, (expected, _) in zip(before, pairs, strict=True))
    return Agreement(hits / max(tokens, 1), same / max(len(pairs), 1), median(before), mean(before), tokens)


def _equal_tokens(expected: Sequence[int], found: Sequence[int]) -> int:
    """Number of tokens before the first difference."""
    for place, (one, other) in enumerate(zip(expected, found, strict=False)):
        if one != other:
            return place
    return min(len(expected), len(found))
