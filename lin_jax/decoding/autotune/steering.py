"""Steering of the decode loop: which shape the next steps use, fixed with a fallback, or chosen while decoding."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float, Int

from lin_jax.decoding.autotune.choice import Choice
from lin_jax.decoding.autotune.chooser import Chooser, Left
from lin_jax.decoding.autotune.evidence import PRIOR, Evidence, evidence_shape
from lin_jax.decoding.autotune.fallback import SpeculationFallback
from lin_jax.decoding.autotune.shapes import DraftShapes
from lin_jax.decoding.autotune.step_costs import COMPARED, StepCosts
from lin_jax.decoding.drafting.hindsight import Hindsight
from lin_jax.decoding.drafting.tree import AnyTree, DraftTree

# Steps that a recorded share of right guesses counts as: few, since every text is another one.
RECORDED_STEPS = 4.0


class Steering(Protocol):
    """Chooses the shapes of the loop's steps, by index; 0 is plain decoding."""

    @property
    def needed(self) -> int:
        """Shape without which the loop cannot go on."""

    def begin_row(self, row: int, text: Sequence[int]) -> None:
        """A prompt, with the first token after it, takes a row of the batch."""

    def choose(
        self, running: Bool[np.ndarray, " B"], ready: Callable[[int], bool], max_steps: int, left: Left = None
    ) -> Choice:
        """Chooses the next steps.

        Args:
            running: `[B]` mask of the rows that are not finished.
            ready: tells which shapes are compiled.
            max_steps: largest number of steps.
            left: `[B]` tokens that each row may still be given, if no prompts wait for a place; None where some do.
        """

    def wanted(self, running: Bool[np.ndarray, " B"], ready: Callable[[int], bool], left: Left = None) -> int | None:
        """Shape to compile next, or None; arguments as in `choose`."""

    def is_unknown(self, shape: int) -> bool:
        """True for a compiled shape that is to be timed before it is used."""

    def take_timing(self, shape: int, ratios: Sequence[float]) -> None:
        """Takes what a step with a shape costs, in plain steps."""

    def update(
        self,
        choice: Choice,
        steps: int,
        drafted: int,
        seconds: float,
        histogram: Int[np.ndarray, "B P"],
        tokens: Callable[[int], list[int]],
    ) -> None:
        """Takes in the steps since the last sync.

        Args:
            choice: what was chosen.
            steps: steps taken.
            drafted: those of them with the chosen shape; the others were plain.
            seconds: their time.
            histogram: `[B, P]` how many of them gave each row 1, 2, ... tokens.
            tokens: new tokens of a row since they were last asked for.
        """


class FixedShape:
    """One shape, which gives way to plain decoding for a while where it does not pay.

    Args:
        shape: its index.
        break_even_tokens: tokens that a step must yield for each row; None uses the shape whatever it yields.
    """

    def __init__(self, shape: int, break_even_tokens: float | None) -> None:
        self.shape = shape
        self.fallback = SpeculationFallback(break_even_tokens)

    @property
    def needed(self) -> int:
        """The shape in use."""
        return self.shape if self.fallback.drafts else 0

    def begin_row(self, row: int, text: Sequence[int]) -> None:
        """Makes no difference."""

    def choose(
        self, running: Bool[np.ndarray, " B"], ready: Callable[[int], bool], max_steps: int, left: Left = None
    ) -> Choice:
        """Takes the shape, or plain decoding during a pause."""
        return Choice(self.needed, self.fallback.steps_until_check(max_steps))

    def wanted(self, running: Bool[np.ndarray, " B"], ready: Callable[[int], bool], left: Left = None) -> int | None:
        """Wants no more than it needs."""

    def is_unknown(self, shape: int) -> bool:
        """Knows all it needs."""
        return False

    def take_timing(self, shape: int, ratios: Sequence[float]) -> None:
        """Makes no difference."""

    def update(
        self,
        choice: Choice,
        steps: int,
        drafted: int,
        seconds: float,
        histogram: Int[np.ndarray, "B P"],
        tokens: Callable[[int], list[int]],
    ) -> None:
        """Counts the tokens of the steps."""
        self.fallback.update(steps, histogram.sum(axis=0))


class AdaptiveShape:
    """Shapes chosen while decoding, from what drafts gave so far and what steps cost.

    Args:
        shapes: the shapes.
        costs: their costs on this machine.
        rows: rows of the batch.
        learned: evidence of earlier texts, which goes on growing here.
    """

    def __init__(self, shapes: DraftShapes, costs: StepCosts, rows: int, learned: Evidence | None = None) -> None:
        self.shapes = shapes
        self.costs = costs
        self.chooser = Chooser(
            shapes.arms,
            costs.cost,
            rows,
            copies=frozenset(shapes.hindsight),
            alerting=shapes.alerting,
            switching=shapes.switching,
            learned=learned,
            visit_cost=costs.visit,
        )
        self.followed: list[dict[int, Hindsight]] = [{} for _ in range(rows)]
        # Tokens that nothing was learned from yet, because nothing could be drafted anyway.
        self.unread: list[list[int]] = [[] for _ in range(rows)]

    @property
    def needed(self) -> int:
        """Plain decoding: the text goes on while everything else is compiled."""
        return 0

    def begin_row(self, row: int, text: Sequence[int]) -> None:
        """Follows a new text, beginning with its prompt and its first token."""
        self.chooser.begin_row(row)
        self.followed[row] = {family: begin() for family, begin in self.shapes.hindsight.items()}
        self.unread[row] = []
        self._follow(row, text)

    def choose(
        self, running: Bool[np.ndarray, " B"], ready: Callable[[int], bool], max_steps: int, left: Left = None
    ) -> Choice:
        """Chooses by expected tokens per cost, within the account of what may be lost."""
        choice = self.chooser.choose(running, self._ready(ready), max_steps, left)
        if choice.arm and self.costs.wants_plain:
            return Choice(0, min(COMPARED, max_steps))
        return choice

    def wanted(self, running: Bool[np.ndarray, " B"], ready: Callable[[int], bool], left: Left = None) -> int | None:
        """Wants what should be tried, or promises most."""
        return self.chooser.wanted(running, [shape for shape in range(1, len(self.shapes.arms)) if ready(shape)], left)

    def is_unknown(self, shape: int) -> bool:
        """True as long as too little was measured on this machine, now and in earlier calls."""
        return self.costs.is_unknown(shape)

    def take_timing(self, shape: int, ratios: Sequence[float]) -> None:
        """Learns what a shape costs."""
        self.costs.take(shape, ratios)

    def update(
        self,
        choice: Choice,
        steps: int,
        drafted: int,
        seconds: float,
        histogram: Int[np.ndarray, "B P"],
        tokens: Callable[[int], list[int]],
    ) -> None:
        """Learns acceptance, cost, and what lookups would have given."""
        self.costs.record(choice.arm, drafted if choice.arm else steps, seconds, steps - drafted if choice.arm else 0)
        self.chooser.update(choice, steps, histogram, drafted)
        for row, followed in enumerate(self.followed):
            if followed:
                self.unread[row] += tokens(row)
        if not self._waits(choice, histogram):
            for row, followed in enumerate(self.followed):
                if followed:
                    self._follow(row, ())

    def _waits(self, choice: Choice, histogram: Int[np.ndarray, "B P"]) -> bool:
        """True where many rows need not be followed yet, since those on which it depends have nothing to copy."""
        rows = [row for row, followed in enumerate(self.followed) if followed]
        if len(self.followed) == 1 or choice.arm or self.chooser.alerted:
            return False
        if not all(each.idle for row in rows for each in self.followed[row].values()):
            return False
        deciding = self.chooser.decisive(histogram @ np.arange(1, histogram.shape[1] + 1))
        # None is left where all have ended.
        return not deciding.any() or not all(repeats_itself(self.unread[row]) for row in np.flatnonzero(deciding))

    def _ready(self, ready: Callable[[int], bool]) -> list[int]:
        return [shape for shape in range(1, len(self.shapes.arms)) if ready(shape) and not self.is_unknown(shape)]

    def _follow(self, row: int, tokens: Sequence[int]) -> None:
        """Reads on in a row, and learns from what copies would have given."""
        self.unread[row] += tokens
        if not self.unread[row] or not self.chooser.follows:
            return
        new, self.unread[row] = self.unread[row], []
        for family, hindsight in self.followed[row].items():
            hindsight.push(new)
            self.chooser.observe_copies(row, family, hindsight.matched, hindsight.trials)


def repeats_itself(tokens: Sequence[int], last: int = 8) -> bool:
    """True where the last tokens of a text occurred in it before."""
    text = np.asarray(tokens, np.int32)
    if text.size <= last:
        return False
    windows = np.lib.stride_tricks.sliding_window_view(text[:-1], last)
    return bool((windows == text[-last:]).all(axis=1).any())


def no_evidence(shapes: DraftShapes) -> Evidence:
    """Evidence to begin with, shared by all texts of a generator."""
    return Evidence.none(1, *evidence_shape(shapes.arms))


def recorded_evidence(shapes: DraftShapes, recorded: Mapping[int, Float[np.ndarray, "K R"]]) -> Evidence:
    """Evidence to begin with where training recorded how often a drafter's guesses are right.

    It counts only where it promises something: the recorded text is harder to guess than what the model writes itself,
    so that a low share says little.

    Args:
        shapes: the shapes.
        recorded: of some drafters of a union, by index, the share of right guesses at each depth and rank, given that
            those above are right.
    """
    evidence = no_evidence(shapes)
    for tree, arm in zip(shapes.trees, shapes.arms, strict=True):
        index, first = shapes.origins.get(arm.family, (-1, 0))
        if arm.depth and index in recorded and arm.family not in shapes.hindsight:
            shares = accepted_shares(tree, recorded[index], first)
            if not len(shares) or shares[0] <= PRIOR:
                continue
            evidence.tries[0, arm.family, : len(shares)] = RECORDED_STEPS
            evidence.hits[0, arm.family, : len(shares)] = RECORDED_STEPS * shares
    return evidence


def accepted_shares(tree: AnyTree, right: Float[np.ndarray, "K R"], first: int = 0) -> Float[np.ndarray, " D"]:
    """Share of steps in which a guess of each depth is accepted, of those in which one of the depth above was.

    Args:
        tree: a static tree; of another one nothing is told.
        right: share of right guesses at each depth and rank, given that those above are right.
        first: rank of the tree that is the table's rank 0.
    """
    reached = np.zeros(min(tree.depth, len(right)) + 1)
    for path in tree.paths if isinstance(tree, DraftTree) else ():
        ranks = [rank - first for rank in path]
        if len(path) < len(reached) and max(ranks) < right.shape[1]:
            reached[len(path)] += np.prod([right[depth, rank] for depth, rank in enumerate(ranks)])
    reached[0] = 1
    known = reached[:-1] > 0
    return (reached[1:] / np.where(known, reached[:-1], 1))[known]
