"""When drafting does not pay, plain decoding goes on for a while, and the tree is tried again.

A plan is made on other texts than those that are decoded. What a step costs hardly depends on the text, what it yields
does: a plan therefore says how many tokens a step of its tree must yield, and the loop's own counts say how many it
does. They are the same whenever the same texts are decoded; no clock has a say.
"""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int

# Steps of a tree between two looks at what it yields.
LOOK = 16
# Steps of plain decoding before the tree's next try: so many at first, twice as many each time that it fails, up to so
# many.
REST, LONGEST_REST = 64, 1024


@dataclass
class Pace:
    """Whether the next steps use the tree.

    Attributes:
        worth: tokens that a step of the tree must yield for each row to be as fast as plain decoding; None if the tree
            stays whatever it yields.
        resting: steps of plain decoding that are left before the tree's next try.
        rest: how long the tree rests when it fails.
        yields: `[P]` how often a step of a row gave 1, 2, ... tokens lately.
    """

    worth: float | None
    resting: int = 0
    rest: int = REST
    yields: Float[np.ndarray, " P"] = field(default_factory=lambda: np.zeros(1))

    @property
    def drafts(self) -> bool:
        """Whether the tree is used now."""
        return self.resting == 0

    def visit(self, most: int) -> int:
        """How many steps to take before the next look, `most` at the most."""
        if self.worth is None:
            return most
        return min(most, LOOK if self.drafts else self.resting)

    def learn(self, steps: int, yields: Int[np.ndarray, " P"]) -> None:
        """Takes notice of a visit: the steps of the loop, and how often a step gave a row 1, 2, ... tokens."""
        if self.worth is None or not yields.any():
            return
        if not self.drafts:
            self.resting = max(self.resting - steps, 0)
            return
        # Older visits count half as much as newer ones, so that a change of the text is noticed.
        self.yields = self.yields / 2 + yields
        mean, error = mean_and_error(self.yields)
        if mean + error >= self.worth:
            self.rest = REST
            return
        self.resting, self.rest = self.rest, min(2 * self.rest, LONGEST_REST)
        self.yields = np.zeros(1)


def mean_and_error(yields: Float[np.ndarray, " P"]) -> tuple[float, float]:
    """The mean of what steps gave, and its standard error."""
    tokens, count = np.arange(1, yields.size + 1), yields.sum()
    mean = float(yields @ tokens / count)
    return mean, float(np.sqrt(yields @ (tokens - mean) ** 2 / count / count))
