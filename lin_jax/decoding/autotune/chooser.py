"""Choice of the draft shape for the next steps, from what drafts gave so far; a pure policy without clock or device.

The loop can decode plainly or with one of a few compiled draft shapes, its *arms*. Evidence says how many tokens a step
of each arm gives, row by row; what it costs, in plain steps, is told. The chooser takes the arm with the most tokens
per cost, and plain decoding where none has more than one.

Of several rows all take the same steps. Where prompts wait for a place, the mean over the rows counts. Where none do,
all is done when the last row is, and a row that has finished early gains nothing: what counts is how much sooner the
row that takes longest is done.

An account bounds what can be lost. The loop leaves an arm on the device, between two steps, as soon as the next one
could exceed it, and leaves copies as soon as they lose. Of few rows, the loop of an arm that copies from the text
itself takes plain steps where there is nothing to copy, and looks for the next match: that is left to it for long.
"""

from collections.abc import Callable, Collection, Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int

from lin_jax.decoding.autotune.account import (
    ALLOWANCE,
    BATCH_ALLOWANCE,
    BATCH_CREDIT,
    CREDIT,
    SURE_MATCH,
    SURE_VALUE,
    LossAccount,
)
from lin_jax.decoding.autotune.choice import NO_ALERT, Arm, Choice, TextCopies
from lin_jax.decoding.autotune.evidence import MATCHES, BatchEvidence, Evidence
from lin_jax.decoding.drafting.ngram_lookup import MOST_WATCHED_ROWS

# Tokens per cost above which an arm is taken: less than that is noise. Copies, of which a few steps are taken at a
# time, must also pay for the sync before them; those of which nothing was seen yet, or that are to be compiled, must
# promise more.
MIN_VALUE, MIN_COPY_VALUE, MIN_ALERT_VALUE = 1.02, 1.1, 1.3
# Share of a sync that the first step of copies must pay for.
SYNC_SHARE = 1.0
# How much better than what is compiled an arm must promise to be to be compiled too.
MIN_GAIN = 1.1
# Steps of a trial, of an arm that pays, and of copies, whose match grows, or can hardly be told from a longer one,
# between two choices; and of plain decoding: few at first, then ever more, and many where a sync is more than the
# account has: in very small models.
TRIAL_STEPS, ARM_STEPS, COPY_STEPS, LONG_COPY_STEPS = 4, 32, 4, 8
FEWEST_PLAIN, MOST_PLAIN, UNPAID_PLAIN = 16, 128, 512
# Plain steps in the account above which plain decoding comes back to the host often, and at least now and then, where
# copies could begin at any token.
HIGH, LOW = 2.0, 0.5
# Plain steps before what lost is tried again: at first, and at most; the pause doubles with each failure.
FIRST_PAUSE, LONGEST_PAUSE = 64, 1024
# Share of accepted guesses that makes an arm worth a trial.
HOPE = 0.8
# Tokens per cost that such a share would give, for a trial; and plain steps that trials leave for copies.
MIN_HOPE, RESERVE = 1.3, 2.5
# Loss after which copies are left, in the extra cost of one step: any step that loses ends them.
PATIENCE = 1.0


# Tokens that each row of a batch may still be given, or None where prompts wait for a place.
Left: TypeAlias = Int[np.ndarray, " B"] | None


def decisive(running: Bool[np.ndarray, " B"], left: Left) -> Bool[np.ndarray, " B"]:
    """Mask of the running rows on which it depends whether drafts pay: without them there would be no gain.

    Where no prompts wait, these are the rows with more than half as many tokens left as the one with the most: drafts
    that cost two plain steps gain nothing by the others.
    """
    if left is None or not running.any():
        return running
    return running & (2 * left > left[running].max())


class Chooser:
    """Chooses among plain decoding and some arms, visit by visit.

    Args:
        arms: plain decoding first.
        cost: cost of a step of an arm, in plain steps, as known by now; asked before every choice.
        rows: rows of the batch.
        observed: families of which evidence comes without any cost: they are tried when it speaks for them.
        copies: families of the observed ones that copy, and are judged by the length of the match.
        alerting: families of these that copy from the text itself: the loop can tell of a match.
        switching: arms that copy from nothing else: of few rows, their loop takes plain steps where nothing matches.
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
        switching: Collection[int] = (),
        learned: Evidence | None = None,
        visit_cost: float = 0.0,
    ) -> None:
        assert arms[0].depth == 0, "plain decoding comes first"
        self.arms = tuple(arms)
        self.cost, self.rows = cost, rows
        self.observed = observed | copies
        self.copies = copies
        self.alerting = alerting if rows <= MOST_WATCHED_ROWS else frozenset()
        self.switching = frozenset(switching if rows <= MOST_WATCHED_ROWS else ())
        self.evidence = BatchEvidence(arms, rows, copies, learned)
        self.account = LossAccount(visit_cost, ALLOWANCE if rows == 1 else BATCH_ALLOWANCE)
        self.credit = CREDIT if rows == 1 else BATCH_CREDIT
        self.steps = 0
        # For each family, the step at which it may be tried again, and the length of its next pause.
        families = max(arm.family for arm in arms) + 1
        self.due = [0] * families
        self.pause = [FIRST_PAUSE] * families
        self.trial = False
        # Whether the loop has just returned for a match.
        self.alerted = False
        # Steps between two syncs that plain decoding alone would take.
        self.most_steps = MOST_PLAIN
        # Values of some running rows, until something is learned.
        self._known: tuple[bytes, list[float]] | None = None
        # Tokens that each row could still be given when the last choice was made.
        self._left: Left = None

    @property
    def balance(self) -> float:
        """Plain steps that may be lost from now on."""
        return self.account.balance

    @property
    def affords_sync(self) -> bool:
        """True where the account has more than a sync with the host costs."""
        return self.account.affords_sync

    @property
    def follows(self) -> bool:
        """True where something could be drafted, so that it is of use to know what copies would give."""
        return self.account.affords_sure_copies

    def decisive(self, tokens: Int[np.ndarray, " B"]) -> Bool[np.ndarray, " B"]:
        """Mask of the rows on which it depends now whether drafts pay.

        Args:
            tokens: `[B]` what each row was given since the last choice.
        """
        left = None if self._left is None else self._left - tokens
        return decisive((tokens > 0) & (True if left is None else left > 0), left)

    def begin_row(self, row: int) -> None:
        """Forgets what a row's last text has shown: another one takes its place."""
        self.evidence.begin_row(row)
        self._known = None

    def observe(self, row: int, family: int, histogram: Float[np.ndarray, " P"], weight: float = 1.0) -> None:
        """Takes in evidence: how often a step of a row had, or would have had, 0, 1, ... accepted guesses."""
        self.evidence.observe(row, family, histogram, weight)
        self._known = None

    def observe_copies(self, row: int, family: int, matched: int, trials: Sequence[tuple[int, bool]]) -> None:
        """Takes in what a family that copies would have given; arguments as in `BatchEvidence.observe_copies`."""
        self.evidence.observe_copies(row, family, matched, trials)
        self._known = None

    def values(self, running: Bool[np.ndarray, " B"], left: Left = None) -> list[float]:
        """Expected speed of decoding with each arm from now on, 1 for plain decoding; arguments as in `choose`.

        Of one row, or where prompts wait, that is a step's expected tokens per cost, mean over the running rows.
        """
        key = running.tobytes() + (b"" if left is None else left.tobytes())
        if self._known is not None and self._known[0] == key:
            return self._known[1]
        rows = running if running.any() else np.ones_like(running)
        tokens = self.evidence.expected_tokens(rows)
        if left is None or not running.any():
            speeds = tokens.mean(axis=0)
        else:
            rest = np.maximum(left[rows], 1)
            speeds = rest.max() / (rest[:, None, None] / tokens).max(axis=0)
        costs = [self.cost(number) for number in range(1, len(self.arms))]
        drafted = zip(self.arms[1:], costs, strict=True)
        values = [1.0, *(float(speeds[arm.family, arm.depth - 1]) / cost for arm, cost in drafted)]
        self._known = key, values
        return values

    def choose(
        self, running: Bool[np.ndarray, " B"], ready: Collection[int], max_steps: int, left: Left = None
    ) -> Choice:
        """Chooses the next steps.

        Args:
            running: `[B]` mask of the rows that are not finished.
            ready: indices of the arms that are compiled.
            max_steps: largest number of steps.
            left: `[B]` tokens that each row may still be given, if no prompts wait; None where some do.
        """
        self.most_steps, self._left = max_steps, left
        values, allowance = self.values(running, left), self.account.allowance
        # From here on what the rows have in common is asked of those that count.
        running = decisive(running, left)
        affordable = [arm for arm in ready if self._affords(arm, values, running, left)]
        best = max((0, *affordable), key=lambda arm: (values[arm], -arm))
        trial = self._due(values, values[best])
        self.trial = False
        spare = allowance - (RESERVE if self.copies else 0)
        if trial is not None and trial in ready and self.cost(trial) - 1 <= spare:
            self.trial = True
            return Choice(trial, min(TRIAL_STEPS, max_steps), self.cost(trial), spare)
        others = [arm for arm in affordable if arm not in self.switching and values[arm] >= self._least(arm)]
        other = max((0, *others), key=lambda arm: (values[arm], -arm))
        copies = self._text_copies(affordable, running)
        # Other drafts that pay are left for a passage that is being repeated, not for those to come.
        if copies is not None and (not other or values[copies.arm] >= max(values[other], MIN_COPY_VALUE)):
            steps, lost = COPY_STEPS if other else self._plain_steps(), self.cost(copies.arm) - 1
            return Choice(copies.arm, min(steps, max_steps), lost + 1, max(self.balance, lost), copies.alert)
        if other:
            return self._drafted(other, running, max_steps)
        if self.alerted:
            # The match that the loop has found was no reason to draft: it is not asked at once again.
            return Choice(0, min(2 * FEWEST_PLAIN, max_steps))
        return Choice(0, min(self._plain_steps(), max_steps), alert=self._alert(running, ready))

    def _drafted(self, arm: int, running: Bool[np.ndarray, " B"], max_steps: int) -> Choice:
        """Steps with an arm that pays: few with copies, which are left as soon as they lose."""
        cost = self.cost(arm)
        if self.arms[arm].family not in self.copies:
            return Choice(arm, min(ARM_STEPS, max_steps), cost, self.account.allowance)
        known = np.min(self.evidence.matched[running, self.arms[arm].family], initial=MATCHES[-1])
        steps = LONG_COPY_STEPS if known >= MATCHES[-1] else COPY_STEPS
        return Choice(arm, min(steps, max_steps), cost, PATIENCE * (cost - 1))

    def _text_copies(self, affordable: Sequence[int], running: Bool[np.ndarray, " B"]) -> TextCopies | None:
        """The arm whose loop changes between plain steps and copies, if one pays."""
        arms = [arm for arm in affordable if arm in self.switching]
        least = MIN_COPY_VALUE if self._has_copied else MIN_ALERT_VALUE
        return self.evidence.best_copies(arms, self.cost, running, least)

    @property
    def _has_copied(self) -> bool:
        """True if something could have been copied from a text itself, in this one or earlier."""
        return bool(self.evidence.shared.tries[:, sorted({self.arms[arm].family for arm in self.switching})].any())

    def _alert(self, running: Bool[np.ndarray, " B"], ready: Collection[int]) -> int:
        """Length of a match at which plain steps end, for an arm that would pay from there and cannot wait by itself.

        Such arms are not compiled yet, or copy from other places as well.
        """
        # A look at many rows that finds nothing costs more than the others have left to lose.
        if self.rows > 1 and not self.affords_sync:
            return NO_ALERT
        found = []
        for arm, each in enumerate(self.arms):
            switching = arm in self.switching
            if not each.depth or each.family not in self.alerting or (switching and arm in ready):
                continue
            sync = 0.0 if switching else self.account.visit_cost
            if self.cost(arm) - 1 <= self.balance - sync:
                least = MIN_ALERT_VALUE + SYNC_SHARE * sync / self.cost(arm)
                found.append(self.evidence.best_copies([arm], self.cost, running, least))
        return min((each.alert for each in found if each is not None), default=NO_ALERT)

    def _affords(self, arm: int, values: Sequence[float], running: Bool[np.ndarray, " B"], left: Left) -> bool:
        """True where a step of an arm may be taken, though it gave nothing but the target's own token."""
        # Between plain steps and copies of the text itself there is no sync.
        spare = self.balance if arm in self.switching else self.account.allowance
        return self.cost(arm) - 1 <= spare + self._credit(arm, values, running, left)

    def _credit(self, arm: int, values: Sequence[float], running: Bool[np.ndarray, " B"], left: Left) -> float:
        """Plain steps by which the account may be overdrawn for an arm."""
        family = self.arms[arm].family
        if family not in self.copies or values[arm] < SURE_VALUE or not running.any():
            return 0.0
        matched = self.evidence.matched[running, family]
        return self.credit if (np.median(matched) if left is None else matched.min()) >= SURE_MATCH else 0.0

    def _least(self, arm: int) -> float:
        """Tokens per cost from which on an arm is taken."""
        if self.arms[arm].family not in self.copies:
            return MIN_VALUE
        sync = 0.0 if arm in self.switching else SYNC_SHARE * self.account.visit_cost
        return MIN_COPY_VALUE + sync / self.cost(arm)

    def _plain_steps(self) -> int:
        """Steps of plain decoding between two choices: few as long as the account can pay for the syncs."""
        if not self.affords_sync:
            return UNPAID_PLAIN
        if not self.copies:
            return max(FEWEST_PLAIN, min(self.steps, MOST_PLAIN))
        balance = self.balance
        if self.alerting and not self.evidence.has_matched(sorted(self.copies - self.alerting)):
            # The loop tells of matches with the text, and a memory that has never matched is not waited for.
            return MOST_PLAIN
        fewest = max(FEWEST_PLAIN, min(self.steps, MOST_PLAIN)) if self.alerting else FEWEST_PLAIN
        return fewest if balance > HIGH else 2 * fewest if balance > LOW else MOST_PLAIN

    def wanted(self, running: Bool[np.ndarray, " B"], ready: Collection[int], left: Left = None) -> int | None:
        """Arm to compile next: one that should be tried, or promises more than those that are ready."""
        values, deciding = self.values(running, left), decisive(running, left)
        # A shape that is too dear to be taken now, compiled or not, takes no other one's place.
        affordable = [arm for arm in range(1, len(self.arms)) if self._affords(arm, values, deciding, left)]
        speeds = {arm: values[arm] for arm in affordable if arm not in self.switching}
        # Those that wait for matches by themselves are judged by all that there were.
        for arms in (affordable, [arm for arm in affordable if arm in ready]):
            copies = self._text_copies(arms, deciding)
            if copies is not None and self._has_copied:
                speeds[copies.arm] = copies.speed
        best = max([1.0, *(speed for arm, speed in speeds.items() if arm in ready)])
        trial = self._due(values, best)
        if trial in affordable and trial not in ready:
            return trial
        missing = {arm: speed for arm, speed in speeds.items() if arm not in ready}
        most = max(missing, key=lambda arm: missing[arm], default=None)
        return most if most is not None and missing[most] > max(self._least(most), MIN_GAIN * best) else None

    def update(self, choice: Choice, steps: int, histogram: Int[np.ndarray, "B P"], drafted: int | None = None) -> None:
        """Takes in the steps of the last choice.

        Args:
            choice: the choice.
            steps: steps taken.
            histogram: `[B, P]` how many of them gave each row 1, 2, ... tokens.
            drafted: those of them with the chosen arm; None if all were.
        """
        counts = np.asarray(histogram, float)
        self._known = None
        if not counts.any():
            return
        gained = self._gained(steps, counts)
        self.steps += steps
        self.alerted = not choice.arm and choice.alert < NO_ALERT and steps < choice.steps
        if not choice.arm:
            self.account.add_plain(gained, max(1 - steps / self.most_steps, 0))
            return
        arm, spent = self.arms[choice.arm], steps + (steps if drafted is None else drafted) * (choice.cost - 1)
        # What the loop does by itself takes no more syncs than plain decoding.
        share = max(1 - gained / self.most_steps, 0) if choice.arm in self.switching else 1.0
        self.account.add_drafted(gained, spent, share)
        for row in range(len(counts)):
            # Of copies every token tells in hindsight.
            if arm.family not in self.copies:
                self.observe(row, arm.family, counts[row, : arm.depth + 1])
        if self.trial:
            pause = FIRST_PAUSE if gained >= spent else self.pause[arm.family]
            self.due[arm.family] = self.steps + pause
            self.pause[arm.family] = min(2 * pause, LONGEST_PAUSE)

    def _gained(self, steps: int, counts: Float[np.ndarray, "B P"]) -> float:
        """Plain steps that would have brought as much as some steps did."""
        tokens, taken = counts @ np.arange(1, counts.shape[1] + 1), counts.sum(axis=1)
        if self._left is None:
            return steps * float(tokens.sum() / counts.sum())
        # Rows that have ended wait for nobody, but that a text ends is no merit of drafts.
        ran = taken > 0
        rest = np.where(ran & (taken >= steps), self._left - tokens, 0)
        return float(min(self._left[ran].max() - rest.max(), tokens.max()))

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
