"""Evidence of how often guesses are accepted: by depth, and of copies by the length of their match, row by row.

Of arms that copy earlier text the host knows more than how often their guesses were accepted: how many of the last
tokens agree with the place that is copied from. The longer this match, the surer the next token, and each further token
that is right makes it longer. How often a copied token is right after a match of each length is counted for every token
of the text, drafted or not, and the expected tokens of a chain follow from the match that there is now.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from lin_jax.decoding.autotune.choice import Arm, TextCopies
from lin_jax.decoding.drafting.ngram_lookup import LONGEST_ALERT

# Share of accepted guesses that is assumed before there is any evidence.
PRIOR = 0.3
# Lengths of a match from which on a copied token is judged apart, the probability that one is wrong after a match of
# one token, as assumed before there is any evidence, and its factor for each further token.
MATCHES, DOUBT, DECAY = (1, 2, 3, 4, 6, 8, 12, 16, 32), 0.5, 0.8
# Steps after which evidence counts half, of one row and of all; and weight of all rows' in a row's estimate.
ROW_MEMORY, SHARED_MEMORY, SHARED_WEIGHT = 64.0, 256.0, 4.0
# Copied tokens of each length of match that evidence counts as at most, and those that are assumed besides where the
# lengths are weighed.
COPY_MEMORY, COPY_PRIOR = 64.0, 1.0


@dataclass
class Evidence:
    """Accepted guesses by depth, counted with a memory that fades; of copied tokens by the length of the match.

    Attributes:
        tries: `[R, F, D]` steps in which a row reached the guess of depth 1, 2, ... of each family; of families that
            copy, copied tokens after a match of `MATCHES`.
        hits: `[R, F, D]` how many of them were accepted.
    """

    tries: Float[np.ndarray, "R F D"]
    hits: Float[np.ndarray, "R F D"]

    @classmethod
    def none(cls, rows: int, families: int, depth: int) -> "Evidence":
        """Evidence of nothing."""
        return cls(np.zeros((rows, families, depth)), np.zeros((rows, families, depth)))

    def add(self, row: int, family: int, reached: Float[np.ndarray, " P"], memory: float) -> None:
        """Adds steps of which `reached` accepted at least 0, 1, ... guesses; older ones count half after `memory`."""
        depth, fade = len(reached) - 1, 0.5 ** (reached[0] / memory)
        for counts, new in ((self.tries, reached[:-1]), (self.hits, reached[1:])):
            counts[row, family] *= fade
            counts[row, family, :depth] += new

    def add_copies(self, row: int, family: int, tries: Sequence[int], hits: Sequence[int]) -> None:
        """Adds copied tokens after matches of each of `MATCHES`, of which all count as `COPY_MEMORY` at most.

        Args:
            row: the row.
            family: the family.
            tries: number of tokens.
            hits: how many of them were right.
        """
        tried, right = self.tries[row, family], self.hits[row, family]
        tried[: len(MATCHES)] += tries
        right[: len(MATCHES)] += hits
        if tried.max() > COPY_MEMORY:
            limit = np.minimum(1, COPY_MEMORY / np.maximum(tried, 1))
            tried *= limit
            right *= limit

    def copy_shares(self, prior: Float[np.ndarray, "F L"] | None, weight: float) -> Float[np.ndarray, "R F L"]:
        """Estimated share of right tokens after a match of each of `MATCHES`.

        Args:
            prior: what is assumed without evidence; None assumes that the doubt decays with the length.
            weight: tokens that the prior counts as.
        """
        assumed = 1 - DOUBT * DECAY ** (np.array(MATCHES) - 1.0) if prior is None else prior
        known = slice(len(MATCHES))
        return (self.hits[:, :, known] + weight * assumed) / (self.tries[:, :, known] + weight)

    def shares(
        self, prior: Float[np.ndarray, "F D"] | None, weight: float, depth: int | None = None
    ) -> Float[np.ndarray, "R F D"]:
        """Estimated share of accepted guesses at each depth, given those before it.

        Args:
            prior: what is assumed without evidence; None assumes `PRIOR` at depth 1, and then what is found above.
            weight: steps that the prior counts as.
            depth: largest depth; None gives all.
        """
        tries, hits = self.tries[:, :, :depth], self.hits[:, :, :depth]
        if prior is not None:
            return (hits + weight * prior) / (tries + weight)
        found, above = np.empty_like(tries), np.full(tries.shape[:2], PRIOR)
        for place in range(tries.shape[2]):
            above = found[:, :, place] = (hits[:, :, place] + weight * above) / (tries[:, :, place] + weight)
        return found


class BatchEvidence:
    """Evidence of each row of a batch, and of all rows together, from which the tokens of the next step follow.

    Args:
        arms: the arms, plain decoding first.
        rows: rows of the batch.
        copies: families that copy, and are judged by the length of the match.
        learned: evidence of earlier texts, `[1, F, D]`, which goes on growing here; None begins anew.

    Attributes:
        shared: of all rows.
        by_row: of each row.
        matched: `[R, F]` last tokens of each row that agree with the place that a family copies from.
    """

    def __init__(self, arms: Sequence[Arm], rows: int, copies: frozenset[int], learned: Evidence | None) -> None:
        self.arms = tuple(arms)
        families, depth = evidence_shape(arms)
        self.copies = sorted(copies)
        self.judged = sorted({arm.family for arm in arms[1:]} - copies)
        self.deepest_judged = max((arm.depth for arm in arms if arm.family in self.judged), default=0)
        self.shared = Evidence.none(1, families, depth) if learned is None else learned
        self.by_row = Evidence.none(rows, families, depth)
        self.matched = np.zeros((rows, families), int)

    def begin_row(self, row: int) -> None:
        """Forgets what a row's last text has shown: another one takes its place."""
        self.by_row.tries[row] = self.by_row.hits[row] = 0
        self.matched[row] = 0

    def observe(self, row: int, family: int, histogram: Float[np.ndarray, " P"], weight: float = 1.0) -> None:
        """Takes in how often a step of a row had, or would have had, 0, 1, ... accepted guesses."""
        reached = weight * np.cumsum(np.asarray(histogram, float)[::-1])[::-1]
        if len(reached) > 1 and reached[0]:
            self.by_row.add(row, family, reached, ROW_MEMORY)
            self.shared.add(0, family, reached, SHARED_MEMORY)

    def observe_copies(self, row: int, family: int, matched: int, trials: Sequence[tuple[int, bool]]) -> None:
        """Takes in what a family that copies would have given, and what it copies from now.

        Args:
            row: the row.
            family: the family.
            matched: last tokens that agree with the place that is copied from; 0 where there is none.
            trials: for copied tokens, the length of the match before each, and whether it was right.
        """
        self.matched[row, family] = matched
        if trials:
            tries, hits = [0] * len(MATCHES), [0] * len(MATCHES)
            for length, right in trials:
                level = _LEVELS[min(length, MATCHES[-1])]
                tries[level] += 1
                hits[level] += right
            self.by_row.add_copies(row, family, tries, hits)
            self.shared.add_copies(0, family, tries, hits)

    def has_matched(self, families: Sequence[int]) -> bool:
        """True if a family of some that copy has had anything to copy from, in a text of the batch."""
        return bool(self.by_row.tries[:, families].any())

    def expected_tokens(self, rows: Bool[np.ndarray, " R"]) -> Float[np.ndarray, "R F D"]:
        """Expected tokens of a step with guesses up to each depth, of each family, for some rows."""
        depth = self.by_row.tries.shape[2]
        shares = np.zeros((int(rows.sum()), self.by_row.tries.shape[1], depth))
        if self.judged:
            deepest = self.deepest_judged
            prior = self.shared.shares(None, 1.0, deepest)[0]
            found = self.by_row.shares(prior, SHARED_WEIGHT, deepest)
            shares[:, self.judged, :deepest] = found[:, self.judged][rows]
        if self.copies:
            known = self._copy_shares(rows)[:, self.copies]
            matched = self.matched[:, self.copies][rows][:, :, None]
            right = np.take_along_axis(known, _level(matched + np.arange(depth)), axis=2)
            shares[:, self.copies] = np.where(matched > 0, right, 0)
        return _tokens(shares)

    def expected_copies(
        self, rows: Bool[np.ndarray, " R"], lengths: Sequence[int], depth: int
    ) -> Float[np.ndarray, "F L D"]:
        """Expected tokens of a step that copies after a match of each of some lengths, by what some rows have shown.

        Args:
            rows: the rows.
            lengths: lengths of a match.
            depth: largest number of copied tokens.
        """
        levels = _level(np.array(lengths)[:, None] + np.arange(depth))
        return _tokens(self._copy_shares(rows).mean(axis=0)[:, levels])

    def best_copies(
        self, candidates: Sequence[int], cost: Callable[[int], float], rows: Bool[np.ndarray, " R"], least: float
    ) -> TextCopies | None:
        """Chooses the arm, and the shortest match after which it copies, that save the most, by the matches so far.

        Args:
            candidates: arms that copy from the text itself.
            cost: cost of a step of an arm, in plain steps.
            rows: the rows that count.
            least: tokens per cost that a step must promise after that match.

        Returns:
            The choice, or None where no arm pays after any match.
        """
        if not candidates or not rows.any():
            return None
        tokens = self.expected_copies(rows, MATCHES, max(self.arms[arm].depth for arm in candidates))
        met = self.by_row.tries[rows].sum(axis=0) + self.shared.tries[0] + COPY_PRIOR
        found = []
        for number in candidates:
            arm = self.arms[number]
            speeds = tokens[arm.family, :, arm.depth - 1] / cost(number)
            share = met[arm.family, : len(MATCHES)] / met[arm.family, : len(MATCHES)].sum()
            # After this match and all longer ones.
            saved = np.cumsum((share * (1 - 1 / speeds))[::-1])[::-1]
            for length, speed, gain in zip(MATCHES, speeds, saved, strict=True):
                if length <= LONGEST_ALERT and speed >= least and gain > 0:
                    found.append(TextCopies(number, length, float(gain)))
        return max(found, key=lambda each: (each.saved, -each.arm), default=None)

    def _copy_shares(self, rows: Bool[np.ndarray, " R"]) -> Float[np.ndarray, "R F L"]:
        prior = self.shared.copy_shares(None, SHARED_WEIGHT)[0]
        return self.by_row.copy_shares(prior, SHARED_WEIGHT)[rows]


def evidence_shape(arms: Sequence[Arm]) -> tuple[int, int]:
    """Number of families of some arms, and their largest depth."""
    return max(arm.family for arm in arms) + 1, max(len(MATCHES), *(arm.depth for arm in arms))


def _tokens(shares: Float[np.ndarray, "*any D"]) -> Float[np.ndarray, "*any D"]:
    """Expected tokens of a step with guesses up to each depth, from the share of right ones at each."""
    return 1 + np.cumsum(np.cumprod(shares, axis=-1), axis=-1)


def _level(matched: Int[np.ndarray, "*any"]) -> Int[np.ndarray, "*any"]:
    """Index in `MATCHES` of the largest length that a match has; matches of nothing count as those of one token."""
    return np.maximum(np.searchsorted(MATCHES, matched, side="right") - 1, 0)


# Of every length up to the longest.
_LEVELS: list[int] = _level(np.arange(MATCHES[-1] + 1)).tolist()
