"""Costs of draft shapes in plain steps: assumed by size, timed before a shape is first used, kept by machine."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median

import jax
import numpy as np

from lin_jax.devices import instruction_set
from lin_jax.files import write_durably
from lin_jax.models import CausalModel
from lin_jax.models.stored_weights import has_int8, has_panels, weight_bytes
from lin_jax.user_cache import cache_folder

# Plain steps that one step with 1, 2, 4, 8, 16 and 32 nodes costs before anything was measured.
SIZES = (1, 2, 4, 8, 16, 32)
ASSUMED: Mapping[str, tuple[float, ...]] = {
    "gpu": (1.0, 1.05, 1.08, 1.12, 1.2, 1.4),
    "tpu": (1.0, 1.05, 1.08, 1.12, 1.2, 1.4),
    "AVX-512": (1.0, 1.35, 1.55, 1.8, 2.4, 3.6),
    # The same with matrices that are there as panels, which make a plain step fast; of batches nearly the same.
    "AVX-512, panels": (1.0, 1.6, 1.85, 2.6, 3.6, 5.5),
    # And with int8 weights, whose plain steps are the fastest.
    "AVX-512, int8": (1.0, 1.4, 2.4, 3.0, 4.0, 6.0),
    "cpu": (1.0, 1.85, 2.15, 2.45, 3.4, 5.5),
}
# Measurements of a shape that are kept; with so many, those of this call change nothing before the next.
KEPT, ENOUGH = 15, 5
# Measurements of a shape that must be known before it is used: as many rounds of timing, each of some steps with the
# shape and more plain ones, as they are taken at a time: of a few steps the first, which take longer, are a large part.
# Rounds end early, and are of single steps, where a plain step takes long.
TIMED, ROUNDS, TIMED_STEPS, TIMED_PLAIN, LONG_STEP, LONGEST_TIMING = 3, 5, 4, 8, 0.02, 0.5
# Bytes of weights that are read while the host looks at the loop, and another program begins, whose first step takes
# longer than its others; and bounds of this cost in plain steps.
VISIT_BYTES = {"cpu": 3e7, "other": 3e8}
LEAST_VISIT, MOST_VISIT = 0.02, 16.0
# How much more or less than assumed unmeasured shapes may cost, beyond a plain step, going by the measured ones.
MOST_FACTOR = 4.0
# Fewer steps between two syncs than this say little about the cost of one.
LEAST_STEPS = 2
# Plain steps with which the times of drafted ones are compared, and drafted steps after which they are taken anew.
COMPARED, COMPARED_AFTER = 8, 128
FILE = "step_costs.json"


class StepCosts:
    """Costs of a few draft shapes on this machine.

    The cost of a shape is the median of its measurements and, as long as there are fewer than `ENOUGH`, of the
    assumption as often as is missing: one disturbed measurement decides nothing. What was timed before a shape was
    first used counts as `TIMED` measurements, each of which gives way to one of steps in use; it tells of the other
    shapes whether they cost more or less than assumed, too.

    Args:
        sizes: numbers of nodes of the shapes, plain decoding (1) first.
        measured: earlier measurements of each shape, in plain steps.
        timed: whether shapes are to be timed before they are first used.
        visit: plain steps that a sync with the host costs.
        kind: of `ASSUMED`; None is that of this device.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        measured: Sequence[Sequence[float]] | None = None,
        *,
        timed: bool = False,
        visit: float = 0.1,
        kind: str | None = None,
    ) -> None:
        self.timed = timed
        self.visit = visit
        self.assumed = [assumed_cost(size, kind) for size in sizes]
        self.earlier = [list(each) for each in measured or [[] for _ in sizes]]
        self.found: list[list[float]] = [[] for _ in sizes]
        self.timings: dict[int, float] = {}
        self.plain_seconds: list[float] = []
        # Drafted steps since the last plain ones.
        self._drafted_steps = COMPARED_AFTER
        # Asked for at every sync.
        self._known: dict[int, float] = {}

    @classmethod
    def of_model(
        cls, model: CausalModel, sizes: Sequence[int], measured: Sequence[Sequence[float]] | None = None
    ) -> "StepCosts":
        """Costs that are timed, of shapes of some sizes, in a model."""
        kind = cost_kind("panels" if has_panels(model) else "int8" if has_int8(model) else "")
        return cls(sizes, measured, timed=True, visit=visit_cost(model), kind=kind)

    def cost(self, shape: int) -> float:
        """Plain steps that a step of a shape costs; at least 1."""
        if not shape:
            return 1.0
        if shape not in self._known:
            earlier = self.earlier[shape]
            known = earlier if len(earlier) >= ENOUGH else [*earlier, *self.found[shape]]
            if shape not in self.timings:
                known = [*known, *[self._assumed(shape)] * (ENOUGH - len(known))]
            self._known[shape] = max(median(known), 1.0)
        return self._known[shape]

    def is_unknown(self, shape: int) -> bool:
        """True for a shape that should be timed before it is used."""
        return self.timed and shape > 0 and len(self.earlier[shape]) + len(self.found[shape]) < TIMED

    def take(self, shape: int, ratios: Sequence[float]) -> None:
        """Takes the timing of a shape, in plain steps."""
        self.found[shape] = [*self.found[shape], *ratios][-KEPT:]
        self.timings[shape] = median(ratios)
        self._known.clear()

    def _assumed(self, shape: int) -> float:
        """Cost of a shape as it was timed, or assumed and scaled as those of the measured shapes would have to be."""
        if shape in self.timings:
            return self.timings[shape]
        found = [[*earlier, *new] for earlier, new in zip(self.earlier, self.found, strict=True)]
        factors = [
            (median(costs) - 1) / (assumed - 1)
            for costs, assumed in zip(found[1:], self.assumed[1:], strict=True)
            if len(costs) >= TIMED and assumed > 1
        ]
        if not factors:
            return self.assumed[shape]
        factor = min(max(median(factors), 1 / MOST_FACTOR), MOST_FACTOR)
        return 1 + factor * (self.assumed[shape] - 1)

    def record(self, shape: int, steps: int, seconds: float, plain_steps: int = 0) -> None:
        """Takes the time of some steps; that of a shape is compared with plain steps of the same moments.

        Args:
            shape: the shape.
            steps: steps with it.
            seconds: their time, together with that of `plain_steps`.
            plain_steps: plain steps between them; where they are many, nothing is learned of the shape.
        """
        if shape and plain_steps and self.plain_seconds:
            seconds -= plain_steps * median(self.plain_seconds)
        if steps < max(LEAST_STEPS, plain_steps) or seconds <= 0:
            return
        if not shape:
            self.plain_seconds, self._drafted_steps = [*self.plain_seconds[-8:], seconds / steps], 0
            return
        self._drafted_steps += steps
        if self.plain_seconds:
            found = seconds / steps / median(self.plain_seconds)
            # The timing gives way to what steps take in use.
            gone = int(self.timings.get(shape) in self.found[shape])
            self.found[shape] = [*self.found[shape], found][gone:][-KEPT:]
            self._known.clear()

    @property
    def wants_plain(self) -> bool:
        """True where times of drafted steps would be compared with none, or with those of long ago, and still count.

        What else a machine does may slow drafted steps, which use all processors, and plain ones not.
        """
        open_shapes = (new and len(old) < ENOUGH for old, new in zip(self.earlier, self.found, strict=True))
        return self.timed and self._drafted_steps >= COMPARED_AFTER and any(open_shapes)

    @property
    def measured(self) -> list[list[float]]:
        """The newest measurements of each shape."""
        return [[*old, *new][-KEPT:] for old, new in zip(self.earlier, self.found, strict=True)]


def time_shape(plain: Callable[[int], int], drafted: Callable[[int], int]) -> list[float]:
    """Times a shape against plain decoding, in turns.

    Args:
        plain: takes up to so many plain steps, and gives the number of those taken; both are compiled.
        drafted: the same with the shape.

    Returns:
        The cost of a step in plain steps, as often as `TIMED` measurements must be known.
    """
    steps, plain_steps, began = 1, 1, time.perf_counter()
    _seconds_per_step(drafted, 1)
    if _seconds_per_step(plain, 1) < LONG_STEP:
        steps, plain_steps = TIMED_STEPS, TIMED_PLAIN
    rounds: list[tuple[float, float]] = []
    while len(rounds) < ROUNDS and not (rounds and time.perf_counter() - began > LONGEST_TIMING):
        rounds.append((_seconds_per_step(plain, plain_steps), _seconds_per_step(drafted, steps)))
    # The least of each: what else the machine does only adds to a time, and most to that of drafted steps, which use
    # all processors. A cost that is too low is set right by use; one that is too high would never be.
    cost = min(each[1] for each in rounds) / min(each[0] for each in rounds)
    return [cost] * TIMED


def _seconds_per_step(take_steps: Callable[[int], int], steps: int) -> float:
    began = time.perf_counter()
    taken = take_steps(steps)
    return (time.perf_counter() - began) / max(taken, 1)


def size_key(model: CausalModel) -> str:
    """Short name for all models of the same architecture, sizes and types: steps cost the same in them."""
    parts = sorted(f"{leaf.dtype}{leaf.shape}" for leaf in jax.tree.leaves(model) if hasattr(leaf, "shape"))
    return hashlib.sha256(f"{model.config}{parts}".encode()).hexdigest()[:12]


def visit_cost(model: CausalModel) -> float:
    """Plain steps that a sync with the host costs: a fixed time, beside that of reading the model's weights.

    In a batch steps take longer, and so does what the host does for its rows.
    """
    while_reading = VISIT_BYTES.get(jax.default_backend(), VISIT_BYTES["other"])
    return float(np.clip(while_reading / max(weight_bytes(model), 1), LEAST_VISIT, MOST_VISIT))


def assumed_cost(size: int, kind: str | None = None) -> float:
    """Plain steps that a step with `size` nodes is assumed to cost on a kind of device; None is this one's."""
    return float(np.interp(size, SIZES, ASSUMED[kind or cost_kind()]))


def cost_kind(weights: str = "") -> str:
    """Key of `ASSUMED` for this device and a model, whose matrices may be there as panels or in int8."""
    platform = jax.default_backend()
    kind = instruction_set() if platform == "cpu" else platform
    special = f"{kind}, {weights}"
    return special if special in ASSUMED else kind if kind in ASSUMED else "cpu"


class CostFile:
    """Measured costs in the user's cache folder, by model size, batch size and draft shape.

    Args:
        path: the file; None takes that of this machine, if there is a cache folder.
    """

    def __init__(self, path: Path | None = None) -> None:
        folder = cache_folder() if path is None else path.parent
        self.path = path or (None if folder is None else folder / FILE)

    def load(self, names: Sequence[str]) -> list[list[float]]:
        """Measurements of the shapes of some names; none where the file is missing or damaged."""
        kept = self._read()
        return [kept.get(name, []) for name in names]

    def save(self, names: Sequence[str], measured: Sequence[Sequence[float]]) -> None:
        """Keeps measurements beside those of other shapes; that it cannot be done costs only time."""
        if self.path is None or not any(measured):
            return
        new = {name: [round(each, 4) for each in costs] for name, costs in zip(names, measured, strict=True) if costs}
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(self.path, json.dumps({**self._read(), **new}, indent=0) + "\n")

    def _read(self) -> dict[str, list[float]]:
        if self.path is None:
            return {}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        rows = content.items() if isinstance(content, dict) else ()
        return {name: costs for name, costs in rows if isinstance(costs, list) and all(map(_is_cost, costs))}


def _is_cost(value: object) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf
