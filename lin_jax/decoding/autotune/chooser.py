"""Choice of the draft shape for the next steps, from what drafts gave so far; a pure policy without clock or device.

The loop can decode plainly or with one of a few compiled draft shapes, its *arms*. The chooser learns how often guesses
are accepted at each depth, row by row, and is told what a step of each arm costs, in plain steps. It takes the arm with
the most tokens per cost, and plain decoding where none has more than one.

An account bounds what can be lost. It counts in plain steps: a step of cost c that gives each row t tokens on average
takes c - t longer than plain decoding would. Everything that is not plain decoding is paid from an allowance of
`ALLOWANCE` plain steps and `RATE` more with each token; what drafts gain flows back, up to `LARGEST_GAIN`. The loop
leaves an arm on the device, between two steps, as soon as the next one could exceed the account. Whatever the text,
decoding T tokens so takes at most T + ALLOWANCE + RATE * T plain steps, as far as the costs are right: for 200 tokens
0.97 of plain decoding's speed or more.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

ALLOWANCE, RATE, LARGEST_GAIN = 3.5, 0.0125, 8.0
# Tokens per cost above which an arm is taken: less than that is noise.
MIN_VALUE = 1.02
# How much better than what is compiled an arm must promise to be to be compiled too.
MIN_GAIN = 1.05
# Steps of a trial, and of an arm that pays, between two choices; and of plain decoding: few at first, then ever more,
# twice as many as there were already.
TRIAL_STEPS, ARM_STEPS, FEWEST_PLAIN, MOST_PLAIN = 4, 32, 32, 128
# Tokens per cost that an arm must promise, should its guesses be right as often as one may hope, to be worth a trial.
MIN_HOPE = 1.2
# Steps of earlier texts that say enough about a family, so that a text need not begin with a trial of it.
ENOUGH_STEPS = 32
# Plain steps before what lost is tried again: at first, and at most; the pause doubles with each failure.
FIRST_PAUSE, LONGEST_PAUSE = 64, 1024
# Share of accepted guesses that makes an arm worth a trial, and that is assumed before there is any evidence: of
# guesses about which nothing is known, and of those that go on with a passage that has agreed for long.
HOPE, PRIOR, SURE_PRIOR = 0.8, 0.3, 0.97
# Failed steps with such a passage after which the loop returns, since the host knows where it ends.
PATIENCE = 1.5
# Steps after which evidence counts half, of one row and of all; and weight of all rows' in a row's estimate.
ROW_MEMORY, SHARED_MEMORY, SHARED_WEIGHT = 64.0, 256.0, 4.0


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
        cost: plain steps that a step of the arm may cost.
        allowance: plain steps that these steps may lose against plain decoding.
    """

    arm: int
    steps: int
    cost: float = 1.0
    allowance: float = float("inf")


@dataclass
class Evidence:
    """Accepted guesses by depth, counted with a memory that fades.

    Of F families the first half are those of the arms, and the second half the same ones where they were sure.

    Attributes:
        tries: `[R, F, D]` steps in which a row reached the guess of depth 1, 2, ... of each family.
        hits: `[R, F, D]` steps in which it was accepted.
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

    def shares(self, prior: Float[np.ndarray, "F D"] | None, weight: float) -> Float[np.ndarray, "R F D"]:
        """Estimated share of accepted guesses at each depth, given those before it.

        Args:
            prior: what is assumed without evidence; None assumes `PRIOR` or `SURE_PRIOR` at depth 1, and then what is
                found above.
            weight: steps that the prior counts as.
        """
        if prior is not None:
            return (self.hits + weight * prior) / (self.tries + weight)
        found = np.empty_like(self.tries)
        above = np.broadcast_to(np.repeat((PRIOR, SURE_PRIOR), found.shape[1] // 2), found.shape[:2])
        # Deeper than any step has come, all is what is found above.
        reached = int(self.tries.any(axis=(0, 1)).sum())
        for depth in range(reached):
            above = (self.hits[:, :, depth] + weight * above) / (self.tries[:, :, depth] + weight)
            found[:, :, depth] = above
        found[:, :, reached:] = above[:, :, None]
        return found


class Chooser:
    """Chooses among plain decoding and some arms, visit by visit.

    Args:
        arms: plain decoding first.
        cost: cost of a step of an arm, in plain steps, as known by now; asked before every choice.
        rows: rows of the batch.
        observed: families of which evidence comes without any cost: they are tried when it speaks for them.
        learned: evidence of earlier texts, `[1, F, D]`, which goes on growing here; None begins anew.
        risk: plain steps that a step of an arm may cost, as far as is known, by which the account is kept; None takes
            the cost.
        visit_cost: plain steps that a sync with the host costs.
    """

    def __init__(
        self,
        arms: Sequence[Arm],
        cost: Callable[[int], float],
        rows: int,
        *,
        observed: frozenset[int] = frozenset(),
        learned: Evidence | None = None,
        risk: Callable[[int], float] | None = None,
        visit_cost: float = 0.0,
    ) -> None:
        assert arms[0].depth == 0, "plain decoding comes first"
        self.arms = tuple(arms)
        self.cost = cost
        self.risk = risk or cost
        self.observed = observed
        self.visit_cost = visit_cost
        kinds, depth = evidence_shape(arms)
        families = kinds // 2
        self.shared = Evidence.none(1, kinds, depth) if learned is None else learned
        self.by_row = Evidence.none(rows, kinds, depth)
        # Rows in which a family's next guesses go on with a passage that has agreed for long.
        self.sure = np.zeros((rows, families), bool)
        self.tokens = self.lost = 0.0
        self.steps = 0
        # For each family, the step at which it may be tried again, and the length of its next pause.
        seen = self.shared.tries[0, :families, 0] >= ENOUGH_STEPS
        self.due = [FIRST_PAUSE if each else 0 for each in seen.tolist()]
        self.pause = [FIRST_PAUSE] * families
        self.trial = False
        # Values of some running rows, until something is learned.
        self._known: tuple[bytes, list[float]] | None = None

    @property
    def balance(self) -> float:
        """Plain steps that may be lost from now on."""
        return ALLOWANCE + RATE * self.tokens - self.lost

    def begin_row(self, row: int) -> None:
        """Forgets what a row's last text has shown: another one takes its place."""
        self.by_row.tries[row] = self.by_row.hits[row] = 0
        self.sure[row] = False
        self._known = None

    def expect(self, row: int, family: int, sure: bool) -> None:
        """Takes in whether a family's next guesses go on with a passage that has agreed for long."""
        if self.sure[row, family] != sure:
            self.sure[row, family] = sure
            self._known = None

    def observe(
        self, row: int, family: int, histogram: Float[np.ndarray, " P"], weight: float = 1.0, *, sure: bool = False
    ) -> None:
        """Takes in evidence: how often a step of a row had, or would have had, 0, 1, ... accepted guesses.

        Args:
            row: the row.
            family: the family of the guesses.
            histogram: number of steps with 0, 1, ... accepted guesses.
            weight: what each of them counts.
            sure: whether they went on with a passage that had agreed for long.
        """
        reached = weight * np.cumsum(np.asarray(histogram, float)[::-1])[::-1]
        family += self.sure.shape[1] if sure else 0
        if len(reached) > 1 and reached[0]:
            self._known = None
            self.by_row.add(row, family, reached, ROW_MEMORY)
            self.shared.add(0, family, reached, SHARED_MEMORY)

    def values(self, running: Bool[np.ndarray, " B"]) -> list[float]:
        """Expected tokens of a step of each arm per cost, mean over the running rows; 1 for plain decoding."""
        key = running.tobytes()
        if self._known is not None and self._known[0] == key:
            return self._known[1]
        rows = running if running.any() else np.ones_like(running)
        shares = self.by_row.shares(self.shared.shares(None, 1.0)[0], SHARED_WEIGHT)[rows]
        found = 1 + np.cumsum(np.cumprod(shares, axis=2), axis=2)
        families = self.sure.shape[1]
        tokens = np.where(self.sure[rows][:, :, None], found[:, families:], found[:, :families]).mean(axis=0)
        costs = [self.cost(number) for number in range(1, len(self.arms))]
        drafted = zip(self.arms[1:], costs, strict=True)
        values = [1.0, *(float(tokens[arm.family, arm.depth - 1]) / cost for arm, cost in drafted)]
        self._known = key, values
        return values

    def choose(self, running: Bool[np.ndarray, " B"], ready: Collection[int], max_steps: int) -> Choice:
        """Chooses the next steps.

        Args:
            running: `[B]` mask of the rows that are not finished.
            ready: indices of the arms that are compiled.
            max_steps: largest number of steps.
        """
        values = self.values(running)
        allowance = self.balance - self.visit_cost
        # A step that gives nothing but the target's own token must be affordable.
        affordable = [arm for arm in ready if self.risk(arm) - 1 <= allowance]
        best = max((0, *affordable), key=lambda arm: (values[arm], -arm))
        trial = self._due(values, values[best])
        self.trial = trial is not None and trial in affordable
        arm, steps = (trial, TRIAL_STEPS) if trial is not None and self.trial else (best, ARM_STEPS)
        cost = self.risk(arm)
        if arm and (self.trial or values[arm] >= MIN_VALUE):
            if np.any(self.sure[running, self.arms[arm].family]):
                allowance = min(allowance, PATIENCE * (cost - 1))
            return Choice(arm, min(steps, max_steps), cost, allowance)
        self.trial = False
        return Choice(0, min(max(FEWEST_PLAIN, min(2 * self.steps, MOST_PLAIN)), max_steps))

    def wanted(self, running: Bool[np.ndarray, " B"], ready: Collection[int]) -> int | None:
        """Arm to compile next: one that should be tried, or promises more than those that are ready."""
        missing = [arm for arm in range(1, len(self.arms)) if arm not in ready]
        if not missing:
            return None
        values = self.values(running)
        best = max(values[arm] for arm in (0, *ready))
        trial = self._due(values, best)
        if trial in missing:
            return trial
        most = max(missing, key=lambda arm: values[arm], default=0)
        return most if values[most] > max(MIN_VALUE, MIN_GAIN * best) else None

    def update(self, choice: Choice, steps: int, histogram: Int[np.ndarray, "B P"]) -> None:
        """Takes in the steps of the last choice.

        Args:
            choice: the choice, with the cost that is known by now.
            steps: steps taken.
            histogram: `[B, P]` how many of them gave each row 1, 2, ... tokens.
        """
        counts = np.asarray(histogram, float)
        self._known = None
        if not counts.any():
            return
        gained = steps * float((counts @ np.arange(1, counts.shape[1] + 1)).sum() / counts.sum())
        self.tokens, self.steps = self.tokens + gained, self.steps + steps
        if not choice.arm:
            # Plain decoding alone would come back to the host as seldom.
            self.lost += self.visit_cost * max(1 - steps / MOST_PLAIN, 0)
            return
        arm, spent = self.arms[choice.arm], steps * choice.cost
        self.lost = max(self.lost + spent + self.visit_cost - gained, -LARGEST_GAIN)
        for row in range(len(counts)):
            # Where a passage ended is found in hindsight.
            if not self.sure[row, arm.family]:
                self.observe(row, arm.family, counts[row, : arm.depth + 1])
        if self.trial:
            pause = FIRST_PAUSE if gained >= spent else self.pause[arm.family]
            self.due[arm.family] = self.steps + pause
            self.pause[arm.family] = min(2 * pause, LONGEST_PAUSE)

    def _due(self, values: Sequence[float], best: float) -> int | None:
        """Arm that should be tried although nothing speaks for it yet, or any more; None if there is none."""
        found: list[tuple[float, int]] = []
        for number, arm in enumerate(self.arms[1:], 1):
            if arm.family in self.observed or self.due[arm.family] > self.steps:
                continue
            hope = (1 + np.cumprod([HOPE] * arm.depth).sum()) / self.risk(number)
            if values[number] < max(best, MIN_VALUE) < hope and hope >= MIN_HOPE:
                found.append((hope, -number))
        return -max(found)[1] if found else None


def evidence_shape(arms: Sequence[Arm]) -> tuple[int, int]:
    """Numbers of families of evidence about some arms, where they are sure and where not, and their largest depth."""
    return 2 * (max(arm.family for arm in arms) + 1), max(1, *(arm.depth for arm in arms))
