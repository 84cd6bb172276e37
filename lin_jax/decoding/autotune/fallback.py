"""Fallback to plain decoding while drafting does not pay; after a pause the tree is tried again.

A plan is made on other texts than those that are decoded. The cost of a step hardly depends on the text, the tokens it
yields do: a plan therefore says how many tokens a step of its tree must yield, and the loop counts how many it does.
The counts are the same whenever the same texts are decoded; no clock is involved.
"""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int

# Steps with the tree between two checks of its yield.
CHECK_EVERY = 16
# Steps of plain decoding before the tree is tried again: at first, and at most; the pause doubles with each failure.
FIRST_PAUSE, LONGEST_PAUSE = 64, 1024


@dataclass
class SpeculationFallback:
    """Decides whether the next steps use the tree or plain decoding.

    Attributes:
        break_even_tokens: tokens that a step of the tree must yield for each row to be as fast as plain decoding; None
            if the tree is used whatever it yields.
        plain_steps_left: steps of plain decoding before the tree is tried again.
        pause: length of the next pause, in steps of plain decoding.
        accepted_histogram: `[P]` number of recent steps of a row that gave 1, 2, ... tokens.
    """

    break_even_tokens: float | None
    plain_steps_left: int = 0
    pause: int = FIRST_PAUSE
    accepted_histogram: Float[np.ndarray, " P"] = field(default_factory=lambda: np.zeros(1))

    @property
    def drafts(self) -> bool:
        """True while the tree is used."""
        return self.plain_steps_left == 0

    def steps_until_check(self, max_steps: int) -> int:
        """Number of steps to take before the next `update`, at most `max_steps`."""
        if self.break_even_tokens is None:
            return max_steps
        return min(max_steps, CHECK_EVERY if self.drafts else self.plain_steps_left)

    def update(self, steps: int, accepted_histogram: Int[np.ndarray, " P"]) -> None:
        """Takes in the steps since the last sync, and how often one of them gave a row 1, 2, ... tokens."""
        if self.break_even_tokens is None or not accepted_histogram.any():
            return
        if not self.drafts:
            self.plain_steps_left = max(self.plain_steps_left - steps, 0)
            return
        # Each update halves the weight of older ones, so that a change of the text is noticed.
        self.accepted_histogram = self.accepted_histogram / 2 + accepted_histogram
        mean, error = mean_and_error(self.accepted_histogram)
        if mean + error >= self.break_even_tokens:
            self.pause = FIRST_PAUSE
            return
        self.plain_steps_left, self.pause = self.pause, min(2 * self.pause, LONGEST_PAUSE)
        self.accepted_histogram = np.zeros(1)


def mean_and_error(accepted_histogram: Float[np.ndarray, " P"]) -> tuple[float, float]:
    """Mean number of tokens per step, and its standard error."""
    tokens, count = np.arange(1, accepted_histogram.size + 1), accepted_histogram.sum()
    mean = float(accepted_histogram @ tokens / count)
    return mean, float(np.sqrt(accepted_histogram @ (tokens - mean) ** 2 / count / count))
