"""Cells, claims and parts of the study, and the places and sizes that cells are run with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lib.study.places import TextPlace, places_of

# Turns in which cells are run, so that every claim has evidence early: some of it for each claim; every attention of
# the paper; more seeds, teachers and tasks; and what only the full study has.
FIRST, BROAD, DEEP, LAST = 1, 2, 3, 4
# Results of cells by their names, of those that are there.
Results = Mapping[str, Mapping[str, Any]]
HOLDS, FAILS, NOT_RUN, UNCLEAR = "holds here", "does not hold here", "not yet run", "not decided here"
PARTLY = "holds in part"
# Whether a claim holds; None where results do not suffice.
Verdict = bool | Literal["holds in part"] | None


@dataclass(frozen=True)
class Sizes:
    """Numbers that differ between the study and its quick trial.

    Attributes:
        steps: of a linearization, transfer and tuning together.
        scratch_steps: of a language model from scratch, and of the study's own teacher.
        task_steps: of a classifier.
        batch: rows of a step.
        length: tokens of a row.
        held_out: batches of held-out text.
        prompts: texts that are continued.
        new_tokens: tokens of a continuation.
        rounds: how often a speed is measured.
        hidden: width of models that are trained here.
        layers: their layers.
        heads: their heads.
        vocabulary: their vocabulary.
        group: tokens of groups and windows.
        kernel: size of the convolution's kernel.
        text_bytes: of a text to train on; None takes what its place says.
        long: tokens of a long text.
        contexts: tokens before those whose latency is measured.
    """

    steps: int = 300
    scratch_steps: int = 400
    task_steps: int = 600
    batch: int = 8
    length: int = 256
    held_out: int = 16
    prompts: int = 16
    new_tokens: int = 96
    rounds: int = 5
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    vocabulary: int = 2048
    group: int = 64
    kernel: int = 63
    text_bytes: int | None = None
    long: int = 100_000
    contexts: tuple[int, ...] = (256, 1024, 4096, 16384)


# A seventh of the training, and shorter texts.
SHORT = Sizes(steps=90, scratch_steps=120, task_steps=180, batch=4, prompts=8, new_tokens=64, rounds=3)
QUICK = Sizes(
    steps=3,
    scratch_steps=4,
    task_steps=3,
    batch=4,
    length=32,
    held_out=1,
    prompts=2,
    new_tokens=24,
    rounds=1,
    hidden=32,
    layers=2,
    heads=2,
    vocabulary=300,
    group=8,
    kernel=7,
    text_bytes=100_000,
    long=300,
    contexts=(32, 64),
)


@dataclass(frozen=True)
class Setup:
    """Where and with what cells run.

    Attributes:
        scratch: folder of models, and of the results of cells.
        quick: whether this is a trial with tiny models and few steps, whose figures say nothing.
        data: places that are named on the command line, by what they are.
        short: whether the budget of every cell is a fraction of the study's.
    """

    scratch: Path
    quick: bool = False
    data: Mapping[str, str] = field(default_factory=dict, hash=False)
    short: bool = False

    @property
    def sizes(self) -> Sizes:
        """Sizes of the study, of the short one or of the quick trial."""
        return QUICK if self.quick else SHORT if self.short else Sizes()

    @property
    def places(self) -> Mapping[str, TextPlace]:
        """Places of texts, models and tasks."""
        return places_of(self.data, quick=self.quick)

    def folder(self, part: str, name: str) -> Path:
        """Folder of the models that a cell trains."""
        return self.scratch / "models" / part / name


@dataclass(frozen=True)
class Cell:
    """One training or evaluation, whose result is kept when it is finished.

    Attributes:
        name: in its part, such as `stories260K/performer/0`.
        run: measures it and returns the result, as JSON has it.
        minutes: that it is expected to take on one core.
        needs: other cells whose models it uses, by part and name.
        turn: in which it is run: cells of an earlier one come first, in all parts; the last is the full study's alone.
    """

    name: str
    run: "partial[dict[str, Any]]"
    minutes: float
    needs: tuple[str, ...] = ()
    turn: int = LAST

    @property
    def settings(self) -> dict[str, Any]:
        """What the result depends on besides the sizes: the function and its keywords."""
        return {"function": self.run.func.__name__, **self.run.keywords}


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, or one of this package's, and what decides it.

    Attributes:
        text: the claim.
        check: says from the results whether it holds, and the figures in words if there are any.
    """

    text: str
    check: Callable[[Results], tuple[Verdict, str]]

    def verdict(self, results: Results) -> tuple[str, str]:
        """One of the words above, and the figures."""
        holds, figures = self.check(results)
        if holds is None:
            return UNCLEAR if figures else NOT_RUN, figures
        return holds if isinstance(holds, str) else HOLDS if holds else FAILS, figures


@dataclass(frozen=True)
class Part:
    """One question of the study.

    Attributes:
        name: by which it is chosen.
        title: above its chapter.
        about: what is compared, and how.
        cells: its cells, given where and with what they run.
        table: lines of Markdown that show its results.
        plot: draws the results to a file; False if there are too few.
        claims: what is said beside the results.
        timed: what results have that are speeds, which other work on the machine spoils; empty if none are.
    """

    name: str
    title: str
    about: str
    cells: Callable[[Setup], Sequence[Cell]]
    table: Callable[[Results], list[str]]
    plot: Callable[[Results, Path], bool]
    claims: tuple[Claim, ...] = ()
    timed: str = ""
