"""Arms among which the decode loop chooses, and a choice among them."""

from dataclasses import dataclass
from typing import NamedTuple

# Length of a match that no text has.
NO_ALERT = 2**30


@dataclass(frozen=True)
class Arm:
    """Draft shape that the loop can take steps with.

    Attributes:
        family: number of the arms whose guesses at each depth are the same: what one shows holds for all of them.
        depth: largest number of accepted guesses of a step; 0 is plain decoding.
    """

    family: int
    depth: int


class Choice(NamedTuple):
    """Steps to take next.

    Attributes:
        arm: index of the arm, 0 for plain decoding.
        steps: number of steps at the most.
        cost: plain steps that a step of the arm costs.
        allowance: plain steps that these steps may lose against plain decoding.
        alert: length of a match with earlier text at which plain steps end. Of an arm that copies from the text, from
            which on it copies, with plain steps elsewhere.
    """

    arm: int
    steps: int
    cost: float = 1.0
    allowance: float = float("inf")
    alert: int = NO_ALERT


class TextCopies(NamedTuple):
    """Draft shape that copies from the text itself, and when.

    Attributes:
        arm: index of the shape.
        alert: number of last tokens that must occur earlier in the text.
        saved: share of the time of plain decoding that it would have saved so far.
    """

    arm: int
    alert: int
    saved: float

    @property
    def speed(self) -> float:
        """Times as fast as plain decoding."""
        return 1 / (1 - self.saved)
