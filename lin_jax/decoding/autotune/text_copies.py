"""Choice of the draft shape that copies from the text itself, and of the length of the match from which on it does.

The loop looks for matches on the device and changes between plain steps and copies by itself, so that no sync with the
host has to be paid for, however short a repeated passage is.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from lin_jax.decoding.autotune.choice import Arm
from lin_jax.decoding.autotune.evidence import MATCHES, BatchEvidence
from lin_jax.decoding.drafting.ngram_lookup import LONGEST_ALERT

# Copied tokens after a match of each length that are assumed beside those that were met.
ASSUMED = 1.0


class TextCopies(NamedTuple):
    """Shape that copies, and when.

    Attributes:
        arm: index of the shape.
        alert: number of last tokens that must occur earlier in the text.
        saved: share of the time of plain decoding that it would have saved so far.
    """

    arm: int
    alert: int
    saved: float


def choose_copies(
    candidates: Sequence[int],
    arms: Sequence[Arm],
    cost: Callable[[int], float],
    evidence: BatchEvidence,
    rows: Bool[np.ndarray, " B"],
    least: float,
) -> TextCopies | None:
    """Chooses the shape and the length of a match that save the most, by the matches that there were.

    Args:
        candidates: indices of the shapes that may be taken.
        arms: all shapes.
        cost: cost of a step of a shape, in plain steps.
        evidence: how often there were matches, and how often copied tokens were right after them.
        rows: rows of the batch that count.
        least: tokens per cost that a step must promise after the shortest match from which on it copies.

    Returns:
        The choice, or None where no shape pays after any match.
    """
    if not candidates or not rows.any():
        return None
    tokens = evidence.expected_copies(rows, MATCHES, max(arms[number].depth for number in candidates))
    met = evidence.met(rows) + ASSUMED
    found = []
    for number in candidates:
        arm = arms[number]
        speeds = tokens[arm.family, :, arm.depth - 1] / cost(number)
        saved = met[arm.family] * (1 - 1 / speeds) / met[arm.family].sum()
        # Of all longer matches too.
        from_here = np.cumsum(saved[::-1])[::-1]
        for level, length in enumerate(MATCHES):
            if length <= LONGEST_ALERT and speeds[level] >= least and from_here[level] > 0:
                found.append(TextCopies(number, length, float(from_here[level])))
    return max(found, key=lambda each: (each.saved, -each.arm), default=None)
