"""Times of the forms of products on this machine, measured in a moment and kept in the user's cache folder."""

import hashlib
import json
import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lin_jax.devices import device_kind
from lin_jax.files import write_durably
from lin_jax.models.lane_sums import NARROW
from lin_jax.models.products import DEFAULTS, FORMS, ROWS, Layout, ProductPlan, panels_of
from lin_jax.user_cache import cache_folder

# Numbers of rows that a session times; those between them take the next one's form. Compiling takes most of the time.
TIMED_ROWS = (1, 4, 8)
# The same of int8 and bfloat16 weights: two rows have a form of their own.
TIMED_ROWS_NARROW = (1, 2, 4, 8)
# Smaller matrices are left as they are: their products take no time.
SMALLEST = 2**16
# Numbers of a matrix that is timed in the place of a larger one.
LARGEST = 2**24
# Two shapes whose sizes differ by less than this factor are timed once.
ALIKE = 4.0
# Matrices that are read in turn are at least as many bytes, so that the caches of a core do not hold them.
_TURN_BYTES = 2**24
_UNROLLED = 4
# How much slower a single row may be if several rows are faster for it.
_SLOWER = 1.05
# How much faster than the default form another one must be: less than that is noise.
_FASTER = 0.9

Shape = tuple[int, int]


@dataclass
class ProductTimes:
    """Seconds of products by type of weights and of rows, shape, form and number of rows.

    Attributes:
        file: where they are kept; None keeps nothing.
        seconds: by key of types and shape, then name of the form, then number of rows.
    """

    file: Path | None = None
    seconds: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)

    @classmethod
    def of_this_machine(cls, folder: Path | None = None) -> "ProductTimes":
        """Those kept for this kind of machine in a folder; None is the user's cache folder, if there is one."""
        what = hashlib.sha256(f"{device_kind()}\n{jax.__version__}\n{sorted(FORMS)}".encode()).hexdigest()[:16]
        folder = folder or cache_folder()
        if folder is None:
            return cls()
        file = folder / f"products-{what}.json"
        try:
            content = json.loads(file.read_text(encoding="utf-8"))["seconds"]
            found = {
                key: {form: {int(rows): float(each) for rows, each in times.items()} for form, times in forms.items()}
                for key, forms in content.items()
                if _shape(key) is not None
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            # There is none, or it is damaged: all is measured anew.
            found = {}
        return cls(file, found)

    def save(self) -> None:
        """Writes them; that it cannot be done costs only the time to measure them again."""
        if self.file is None:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_durably(self.file, json.dumps({"device": device_kind(), "seconds": self.seconds}, indent=1) + "\n")
        except OSError:
            pass

    def measure(
        self,
        shapes: Iterable[Shape],
        weights: str,
        compute: str,
        *,
        rows: Sequence[int] | None = None,
        most: int = 2,
        budget: float = 0.3,
        forms: Collection[str] = tuple(FORMS),
    ) -> None:
        """Times the shapes that nothing alike has been timed for, and keeps the result.

        Args:
            shapes: numbers of inputs and outputs, the most important first.
            weights: type of the weights.
            compute: type of the rows.
            rows: numbers of rows; None takes those that a session times.
            most: shapes that are timed at the most.
            budget: seconds after which a shape is not timed again; compiling is not counted.
            forms: names of the forms that are timed.
        """
        if rows is None:
            rows = TIMED_ROWS_NARROW if weights in NARROW else TIMED_ROWS
        done = 0
        for shape in shapes:
            if done < most and self.nearest(shape, weights, compute, ALIKE) is None:
                self.time(shape, weights, compute, rows, budget=budget, forms=forms)
                done += 1
        if done:
            self.save()

    def time(
        self,
        shape: Shape,
        weights: str,
        compute: str,
        rows: Sequence[int],
        *,
        budget: float = 1.0,
        forms: Collection[str] = tuple(FORMS),
    ) -> dict[str, dict[int, float]]:
        """Times one shape, or fewer outputs of it if it is large; arguments as in `measure`."""
        timed = bounded(shape)
        found = time_forms(timed, weights, compute, rows, budget=budget, forms=forms)
        self.seconds[_key(timed, weights, compute)] = found
        return found

    def nearest(
        self, shape: Shape, weights: str, compute: str, factor: float = math.inf
    ) -> Mapping[str, Mapping[int, float]] | None:
        """Times of the shape most like a given one, at most a factor away in its sizes; None if there are none."""
        wanted, prefix = bounded(shape), _key((0, 0), weights, compute).removesuffix("0x0")
        known = {key: _shape(key) for key in self.seconds if key.startswith(prefix)}
        distances = {key: _distance(wanted, other) for key, other in known.items() if other is not None}
        best = min(distances, key=lambda key: distances[key], default=None)
        if best is None or distances[best] > math.log(factor):
            return None
        return self.seconds[best]

    def plan(
        self,
        shape: Shape,
        weights: str,
        compute: str,
        layouts: Sequence[Layout] = ("io", "oi"),
        forms: Collection[str] = tuple(FORMS),
    ) -> ProductPlan:
        """The fastest forms for a matrix: as timed, or the default where nothing was.

        Args:
            shape: numbers of inputs and outputs.
            weights: type of the weights.
            compute: type of the rows.
            layouts: those that it can be stored in.
            forms: names of the forms to choose from.
        """
        found = (None if compute == "float64" else self.nearest(shape, weights, compute)) or {}
        found = {name: times for name, times in found.items() if name in forms and FORMS[name].fits(shape[0], weights)}
        defaults = [DEFAULTS[weights, layout] for layout in layouts if (weights, layout) in DEFAULTS]
        known = {default.layout: best for default in defaults if (best := _fastest(found, default))}
        if not known:
            return defaults[0]
        # Most rows, but not at the cost of plain decoding, which has one.
        one = min(best[min(best)][1] for best in known.values())
        fit = {layout: best for layout, best in known.items() if best[min(best)][1] <= _SLOWER * one}
        layout = min(fit, key=lambda layout: _mean_log(fit[layout]))
        return ProductPlan(layout, tuple((rows, name) for rows, (name, _) in sorted(fit[layout].items())))


def _fastest(times: Mapping[str, Mapping[int, float]], default: ProductPlan) -> dict[int, tuple[str, float]]:
    """The fastest form in the default's layout, or as panels, and its seconds, by number of rows.

    The default's own form stays where no other one is clearly faster. More rows than a form is for take a real product.
    """
    layouts = (default.layout, "panels")
    forms = {name: found for name, found in times.items() if name in FORMS and FORMS[name].layout in layouts}
    best: dict[int, tuple[str, float]] = {}
    for rows in sorted({each for found in forms.values() for each in found}):
        timed = {name: found[rows] for name, found in forms.items() if rows in found}
        name, usual = min(timed, key=lambda name: timed[name]), default.name(rows)
        if usual in timed and timed[name] > _FASTER * timed[usual]:
            name = usual
        best[rows] = (name, timed[name])
    if best:
        name, seconds = best[max(best)]
        most = FORMS[name].most
        if most < ROWS[-1]:
            best[most] = (name, seconds)
            best[ROWS[-1]] = (default.name(ROWS[-1]), seconds)
    return best


def time_forms(
    shape: Shape,
    weights: str,
    compute: str,
    rows: Sequence[int],
    *,
    rounds: int = 7,
    budget: float = 1.0,
    forms: Collection[str] = tuple(FORMS),
) -> dict[str, dict[int, float]]:
    """Seconds of one product in every form that is worth trying; the least of several rounds that take turns.

    Args:
        shape: numbers of inputs and outputs.
        weights: type of the weights.
        compute: type of the rows.
        rows: numbers of rows.
        rounds: number of rounds.
        budget: seconds after which no further round begins.
        forms: names of the forms that are timed.
    """
    matrices = _matrices(shape, weights)
    programs: dict[tuple[str, int], tuple[Any, Any, Any]] = {}
    for name, form in FORMS.items():
        if weights not in form.dtypes or name not in forms or not form.fits(shape[0], weights):
            continue
        ours = [[_laid_out(each, form.layout) for each in group] for group in matrices]
        for count in rows:
            if count <= form.most:
                x = jnp.ones((count, shape[0]), compute)
                program = jax.jit(lambda x, group, form=form: _chained(x, group, form.apply))
                jax.block_until_ready(program(x, ours[0]))
                programs[name, count] = (program, x, ours)
    found: dict[str, dict[int, float]] = {}
    begun = time.perf_counter()
    for number in range(rounds):
        if number > 1 and time.perf_counter() - begun > budget:
            break
        for (name, count), (program, x, groups) in programs.items():
            start = time.perf_counter()
            jax.block_until_ready([program(x, group) for group in groups])
            seconds = (time.perf_counter() - start) / sum(map(len, groups))
            times = found.setdefault(name, {})
            times[count] = min(seconds, times.get(count, math.inf))
    return found


def _laid_out(matrix: jax.Array, layout: str) -> jax.Array:
    """A matrix `[O, I]` in a layout."""
    if layout == "oi":
        return matrix
    return matrix.T if layout == "io" else panels_of(matrix.T)


def _chained(x: jax.Array, group: Sequence[jax.Array], apply: Any) -> jax.Array:
    """Products one after the other, as in a model: none can begin before the last one's result is there."""
    for weight in group:
        # All of them, or compilers would leave out those that are not used.
        found = jax.lax.optimization_barrier(apply(x, weight))
        x = x + (found[:, :1] * 1e-6).astype(x.dtype)
    return x


def _matrices(shape: Shape, weights: str) -> list[list[jax.Array]]:
    """Groups of matrices `[O, I]` of some numbers, together too large for the caches of a core."""
    size = math.prod(shape) * jnp.dtype(weights).itemsize
    count = min(max(_TURN_BYTES // size, 1), 16)
    numbers = np.random.default_rng(0).integers(-127, 128, shape[::-1], dtype=np.int8)
    made = [jnp.asarray(np.roll(numbers, turn, axis=0)).astype(weights) for turn in range(count)]
    return [made[at : at + _UNROLLED] for at in range(0, count - count % _UNROLLED or count, _UNROLLED)]


def bounded(shape: Shape) -> Shape:
    """A shape with as many inputs and fewer outputs, where it is too large to be timed in a moment."""
    size_in, size_out = shape
    return size_in, min(size_out, max(LARGEST // size_in, 1))


def _key(shape: Shape, weights: str, compute: str) -> str:
    return f"{weights} {compute} {shape[0]}x{shape[1]}"


def _shape(key: str) -> Shape | None:
    try:
        size_in, size_out = key.rpartition(" ")[2].split("x")
        return int(size_in), int(size_out)
    except ValueError:
        return None


def _distance(one: Shape, other: Shape) -> float:
    """Difference of two shapes, by their size and a little by their form."""
    ins, outs = (abs(math.log(a / b)) if a and b else math.inf for a, b in zip(one, other, strict=True))
    size = abs(math.log(math.prod(one) / math.prod(other))) if math.prod(other) else math.inf
    return size + 0.1 * (ins + outs)


def _mean_log(best: Mapping[int, tuple[str, float]]) -> float:
    """Logarithm of the geometric mean of the seconds of the timed numbers of rows."""
    return float(np.mean([math.log(seconds) for _, seconds in best.values()]))
