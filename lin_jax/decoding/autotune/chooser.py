"""Choice of the draft shape for the next steps, from what drafts gave so far; a pure policy without clock or device.

The loop can decode plainly or with one of a few compiled draft shapes, its *arms*. The chooser learns how often guesses
are accepted at each depth, row by row, and is told what a step of each arm costs, in plain steps. It takes the arm with
the most tokens per cost, and plain decoding where none has more than one.

Of arms that copy earlier text the host knows more: how many of the last tokens agree with the place that is copied
from. The longer this match, the surer the next token, and each further token that is right makes it longer. How often a
copied token is right after a match of each length is counted for every token of the text, drafted or not, and the
expected tokens of a chain follow from the match that there is now.

An account bounds what can be lost. It counts in plain steps: a step of cost c that gives each row t tokens on average
takes c - t longer than plain decoding would. Everything that is not plain decoding is paid from an allowance of
`ALLOWANCE` plain steps and `RATE` more with each token; what drafts gain flows back, up to `LARGEST_GAIN`. The loop
leaves an arm on the device, between two steps, as soon as the next one could exceed the account, and leaves copies as
soon as they lose. Syncs with the host are paid from the account too. Whatever the text, decoding T tokens so takes at
most T + ALLOWANCE + RATE * T plain steps, as far as the costs are right: for 200 tokens 0.97 of plain decoding's speed
or more. Copies alone may overdraw the account, by at most `CREDIT`, where a long match promises `SURE_VALUE` tokens per
cost: a text that repeats itself for long, and then does not, can lose as much more.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from lin_jax.decoding.drafting.ngram_lookup import LONGEST_ALERT

ALLOWANCE, RATE, LARGEST_GAIN = 5.0, 0.005, 8.0
# Tokens per cost above which an arm is taken: less than that is noise. Copies, of which a few steps are taken at a
# time, must also pay for the sync before them, the more so if plain decoding is interrupted for it.
MIN_VALUE, MIN_COPY_VALUE, MIN_ALERT_VALUE = 1.02, 1.1, 1.3
# Share of a sync that the first step of copies must pay for.
SYNC_SHARE = 1.0
# Length of a match that no text has.
NO_ALERT = 2**30
# How much better than what is compiled an arm must promise to be to be compiled too.
MIN_GAIN = 1.1
# Steps of a trial, of an arm that pays, and of copies, whose match grows, between two choices; and of plain decoding:
# few at first, then ever more, and many where a sync is more than the account has: in very small models.
TRIAL_STEPS, ARM_STEPS, COPY_STEPS, FEWEST_PLAIN, MOST_PLAIN, UNPAID_PLAIN = 4, 32, 4, 16, 128, 512
# Plain steps in the account above which plain decoding comes back to the host often, and at least now and then, where
# copies could begin at any token.
HIGH, LOW = 2.0, 0.5
# Plain steps before what lost is tried again: at first, and at most; the pause doubles with each failure.
FIRST_PAUSE, LONGEST_PAUSE = 64, 1024
# Share of accepted guesses that makes an arm worth a trial, and that is assumed before there is any evidence.
HOPE, PRIOR = 0.8, 0.3
# Tokens per cost that such a share would give, for a trial; and plain steps that trials leave for copies.
MIN_HOPE, RESERVE = 1.3, 2.5
# Lengths of a match from which on a copied token is judged apart, the probability that one is wrong after a match of
# one token, as assumed before there is any evidence, and its factor for each further token.
MATCHES, DOUBT, DECAY = (1, 2, 3, 4, 6, 8, 12, 16, 32), 0.5, 0.8
# Tokens per cost that copies must promise for the account to be overdrawn, and by how many plain steps at most.
SURE_VALUE, CREDIT = 2.0, 10.0
# Loss after which copies are left, in the extra cost of one step: any step that loses ends them.
PATIENCE = 1.0
# Steps after which evidence counts half, of one row and of all; and weight of all rows' in a row's estimate.
ROW_MEMORY, SHARED_MEMORY, SHARED_WEIGHT = 64.0, 256.0, 4.0
# Copied tokens of each length of match that evidence counts as at most.
COPY_MEMORY = 64.0


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
        alert: length of a match with earlier text at which plain steps end.
    """

    arm: int
    steps: int
    cost: float = 1.0
    allowance: float = float("inf")
    alert: int = NO_ALERT


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

    def add_copies(self, row: int, family: int, matched: Int[np.ndarray, " n"], right: Bool[np.ndarray, " n"]) -> None:
        """Adds copied tokens, after matches of some lengths; of each length all count as `COPY_MEMORY` at most."""
        level = _level(matched)
        for counts, which in ((self.tries, level), (self.hits, level[right])):
            counts[row, family, : len(MATCHES)] += np.bincount(which, minlength=len(MATCHES))
        # Counts that exceed the memory are scaled down to it.
        limit = np.minimum(1, COPY_MEMORY / np.maximum(self.tries[row, family], 1))
        self.tries[row, family] *= limit
        self.hits[row, family] *= limit

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


class Chooser:
    """Chooses among plain decoding and some arms, visit by visit.

    Args:
        arms: plain decoding first.
        cost: cost of a step of an arm, in plain steps, as known by now; asked before every choice.
        rows: rows of the batch.
        observed: families of which evidence comes without any cost: they are tried when it speaks for them.
        copies: families of the observed ones that copy, and are judged by the length of the match.
        alerting: families of these that copy from the text itself: the loop of plain steps can tell of a match.
        learned: evidence of earlier texts, `[1, F, D]`, which goes on growing here; None begins anew.
        visit_cost: plain steps that a sync with the host costs.
    """

    def __init__(
        self,
        arms: Sequence[Arm],
        cost: Callable[[int], float],
        rows: int,
        *,
        observed: frozenset[int] = frozenset(),
        copies: frozenset[int] = frozenset(),
        alerting: frozenset[int] = frozenset(),
        learned: Evidence | None = None,
        visit_cost: float = 0.0,
    ) -> None:
        assert arms[0].depth == 0, "plain decoding comes first"
        self.arms = tuple(arms)
        self.cost = cost
        self.observed = observed | copies
        self.copies = copies
        self.alerting = alerting
        self.judged = sorted({arm.family for arm in arms[1:]} - copies)
        self.visit_cost = visit_cost
        families, depth = evidence_shape(arms)
        self.shared = Evidence.none(1, families, depth) if learned is None else learned
        self.by_row = Evidence.none(rows, families, depth)
        # Last tokens of each row that agree with the place that a family copies from.
        self.matched = np.zeros((rows, families), int)
        self.tokens = self.lost = 0.0
        self.steps = 0
        # For each family, the step at which it may be tried again, and the length of its next pause.
        self.due = [0] * families
        self.pause = [FIRST_PAUSE] * families
        self.trial = False
        # Whether the loop has just returned for a match.
        self.alerted = False
        # Steps between two syncs that plain decoding alone would take.
        self.most_steps = MOST_PLAIN
        # Values of some running rows, until something is learned.
        self._known: tuple[bytes, list[float]] | None = None

    @property
    def balance(self) -> float:
        """Plain steps that may be lost from now on."""
        return ALLOWANCE + RATE * self.tokens - self.lost

    @property
    def affords_sync(self) -> bool:
        """True where the account has more than a sync with the host costs; else nothing can be drafted."""
        return self.visit_cost <= self.balance

    def begin_row(self, row: int) -> None:
        """Forgets what a row's last text has shown: another one takes its place."""
        self.by_row.tries[row] = self.by_row.hits[row] = 0
        self.matched[row] = 0
        self._known = None

    def observe(self, row: int, family: int, histogram: Float[np.ndarray, " P"], weight: float = 1.0) -> None:
        """Takes in evidence: how often a step of a row had, or would have had, 0, 1, ... accepted guesses."""
        reached = weight * np.cumsum(np.asarray(histogram, float)[::-1])[::-1]
        self._known = None
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
        self._known = None
        self.matched[row, family] = matched
        if trials:
            lengths, right = (np.array(each) for each in zip(*trials, strict=True))
            self.by_row.add_copies(row, family, lengths, right)
            self.shared.add_copies(0, family, lengths, right)

    def values(self, running: Bool[np.ndarray, " B"]) -> list[float]:
        """Expected tokens of a step of each arm per cost, mean over the running rows; 1 for plain decoding."""
        key = running.tobytes()
        if self._known is not None and self._known[0] == key:
            return self._known[1]
        rows = running if running.any() else np.ones_like(running)
        tokens = self._expected_tokens(rows)
        costs = [self.cost(number) for number in range(1, len(self.arms))]
        drafted = zip(self.arms[1:], costs, strict=True)
        values = [1.0, *(float(tokens[arm.family, arm.depth - 1]) / cost for arm, cost in drafted)]
        self._known = key, values
        return values

    def _expected_tokens(self, rows: Bool[np.ndarray, " B"]) -> Float[np.ndarray, "F D"]:
        """Expected tokens of a step with guesses up to each depth, of each family, mean over some rows."""
        depth = self.by_row.tries.shape[2]
        shares = np.zeros((int(rows.sum()), self.by_row.tries.shape[1], depth))
        if self.judged:
            deepest = max(arm.depth for arm in self.arms if arm.family in self.judged)
            prior = self.shared.shares(None, 1.0, deepest)[0]
            found = self.by_row.shares(prior, SHARED_WEIGHT, deepest)
            shares[:, self.judged, :deepest] = found[:, self.judged][rows]
        if self.copies:
            copied = sorted(self.copies)
            known = self.by_row.copy_shares(self.shared.copy_shares(None, SHARED_WEIGHT)[0], SHARED_WEIGHT)
            matched = self.matched[:, copied][rows][:, :, None]
            right = np.take_along_axis(known[:, copied][rows], _level(matched + np.arange(depth)), axis=2)
            shares[:, copied] = np.where(matched > 0, right, 0)
        return 1 + np.cumsum(np.cumprod(shares, axis=2), axis=2).mean(axis=0)

    def choose(self, running: Bool[np.ndarray, " B"], ready: Collection[int], max_steps: int) -> Choice:
        """Chooses the next steps.

        Args:
            running: `[B]` mask of the rows that are not finished.
            ready: indices of the arms that are compiled.
            max_steps: largest number of steps.
        """
        self.most_steps = max_steps
        values, allowance = self.values(running), self.balance - self.visit_cost
        # A step that gives nothing but the target's own token must be affordable.
        affordable = [arm for arm in ready if self.cost(arm) - 1 <= allowance + self._credit(arm, values)]
        best = max((0, *affordable), key=lambda arm: (values[arm], -arm))
        trial = self._due(values, values[best])
        self.trial = False
        spare = allowance - (RESERVE if self.copies else 0)
        if trial is not None and trial in ready and self.cost(trial) - 1 <= spare:
            self.trial = True
            return Choice(trial, min(TRIAL_STEPS, max_steps), self.cost(trial), spare)
        if best and values[best] >= self._least(best):
            cost, steps = self.cost(best), ARM_STEPS
            if self.arms[best].family in self.copies:
                allowance, steps = PATIENCE * (cost - 1), COPY_STEPS
            return Choice(best, min(steps, max_steps), cost, allowance)
        steps = min(self._plain_steps(), max_steps)
        if self.alerted:
            # The match that the loop has found was no reason to draft: it is not asked at once again.
            return Choice(0, min(2 * FEWEST_PLAIN, max_steps))
        return Choice(0, steps, alert=self._alert(running))

    def _alert(self, running: Bool[np.ndarray, " B"]) -> int:
        """Length of a match from which on some copy would pay, by what all running rows have shown."""
        allowance = self.balance - self.visit_cost
        # Those that are not compiled too, which then are wanted.
        copying = [arm for arm in range(1, len(self.arms)) if self.arms[arm].family in self.alerting]
        arms = [arm for arm in copying if self.cost(arm) - 1 <= allowance + CREDIT]
        if not arms or not running.any():
            return NO_ALERT
        known = self.by_row.copy_shares(self.shared.copy_shares(None, SHARED_WEIGHT)[0], SHARED_WEIGHT)[running]
        depth = max(self.arms[arm].depth for arm in arms)
        lengths = [length for length in MATCHES if length <= LONGEST_ALERT]
        levels = _level(np.array(lengths)[:, None] + np.arange(depth))
        tokens = 1 + np.cumsum(np.cumprod(known.mean(axis=0)[:, levels], axis=2), axis=2)
        values = [tokens[self.arms[arm].family, :, self.arms[arm].depth - 1] / self.cost(arm) for arm in arms]
        least = [
            (MIN_ALERT_VALUE if self.cost(arm) - 1 <= allowance else SURE_VALUE)
            + SYNC_SHARE * self.visit_cost / self.cost(arm)
            for arm in arms
        ]
        pay = np.flatnonzero(np.max([found >= need for found, need in zip(values, least, strict=True)], axis=0))
        return lengths[pay[0]] if len(pay) else NO_ALERT

    def _credit(self, arm: int, values: Sequence[float]) -> float:
        """Plain steps by which the account may be overdrawn for an arm."""
        return CREDIT if self.arms[arm].family in self.copies and values[arm] >= SURE_VALUE else 0.0

    def _least(self, arm: int) -> float:
        """Tokens per cost from which on an arm is taken."""
        copies = self.arms[arm].family in self.copies
        return MIN_COPY_VALUE + SYNC_SHARE * self.visit_cost / self.cost(arm) if copies else MIN_VALUE

    def _plain_steps(self) -> int:
        """Steps of plain decoding between two choices: few as long as the account can pay for the syncs."""
        if not self.affords_sync:
            return UNPAID_PLAIN
        if not self.copies:
            return max(FEWEST_PLAIN, min(self.steps, MOST_PLAIN))
        balance, blind = self.balance, sorted(self.copies - self.alerting)
        if self.alerting and not self.by_row.tries[:, blind].any():
            # The loop tells of matches with the text, and a memory that has never matched is not waited for.
            return MOST_PLAIN
        fewest = max(FEWEST_PLAIN, min(self.steps, MOST_PLAIN)) if self.alerting else FEWEST_PLAIN
        return fewest if balance > HIGH else 2 * fewest if balance > LOW else MOST_PLAIN

    def wanted(self, running: Bool[np.ndarray, " B"], ready: Collection[int]) -> int | None:
        """Arm to compile next: one that should be tried, or promises more than those that are ready."""
        values = self.values(running)
        best = max(values[arm] for arm in (0, *ready))
        missing = [arm for arm in range(1, len(self.arms)) if arm not in ready]
        trial = self._due(values, best)
        if trial in missing:
            return trial
        most = max(missing, key=lambda arm: values[arm], default=0)
        return most if values[most] > max(self._least(most), MIN_GAIN * best) else None

    def update(self, choice: Choice, steps: int, histogram: Int[np.ndarray, "B P"]) -> None:
        """Takes in the steps of the last choice.

        Args:
            choice: the choice.
            steps: steps taken.
            histogram: `[B, P]` how many of them gave each row 1, 2, ... tokens.
        """
        counts = np.asarray(histogram, float)
        self._known = None
        if not counts.any():
            return
        gained = steps * float((counts @ np.arange(1, counts.shape[1] + 1)).sum() / counts.sum())
        self.tokens, self.steps = self.tokens + gained, self.steps + steps
        self.alerted = not choice.arm and choice.alert < NO_ALERT and steps < choice.steps
        if not choice.arm:
            self.lost += self.visit_cost * max(1 - steps / self.most_steps, 0)
            return
        arm, spent = self.arms[choice.arm], steps * choice.cost
        self.lost = max(self.lost + spent + self.visit_cost - gained, -LARGEST_GAIN)
        for row in range(len(counts)):
            # Of copies every token tells in hindsight.
            if arm.family not in self.copies:
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
            hope = (1 + np.cumprod([HOPE] * arm.depth).sum()) / self.cost(number)
            if values[number] < max(best, MIN_VALUE) < hope and hope >= MIN_HOPE:
                found.append((hope, -number))
        return -max(found)[1] if found else None


def evidence_shape(arms: Sequence[Arm]) -> tuple[int, int]:
    """Number of families of some arms, and their largest depth."""
    return max(arm.family for arm in arms) + 1, max(len(MATCHES), *(arm.depth for arm in arms))


def _level(matched: Int[np.ndarray, "*any"]) -> Int[np.ndarray, "*any"]:
    """Index in `MATCHES` of the largest length that a match has; matches of nothing count as those of one token."""
    return np.maximum(np.searchsorted(MATCHES, matched, side="right") - 1, 0)
