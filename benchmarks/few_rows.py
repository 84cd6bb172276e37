"""Products of few rows with a weight matrix: every form, by number of rows, shape and type of weights.

    python benchmarks/few_rows.py [--shapes 384x1024 2048x8192] [--rows 1 2 4 8 16] [--weights float32 int8] [--keep]

Forms take turns round after round, and the least of each counts, as what else a machine does only adds to a time.
Products follow each other as in a model, over matrices too many for the caches of a core. With --keep the times go to
the user's cache folder, where sessions look for them.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from lib.report import header, write
from tqdm import tqdm

from lin_jax.errors import UserError, exit_cleanly
from lin_jax.models.product_timing import ProductTimes, bounded
from lin_jax.models.products import FORMS

SHAPES = ("256x256", "384x1024", "1024x1024", "2048x2048", "2048x8192", "8192x2048", "512x32000")
WEIGHTS = ("float32", "bfloat16", "int8")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = _parse(argv)
    about = header("few_rows")
    print(f"{about['device']}, jax {about['jax']}; microseconds of one product", file=sys.stderr)
    kept = ProductTimes.of_this_machine()
    times = kept if options.keep else ProductTimes()
    cases = [(weights, shape) for weights in options.weights for shape in options.shapes]
    rows: list[dict[str, Any]] = []
    for weights, shape in tqdm(cases, unit="shape", file=sys.stderr, disable=not sys.stderr.isatty()):
        found = times.time(shape, weights, options.compute, options.rows, budget=options.seconds)
        rows += _table(weights, bounded(shape), found, options.rows)
    if options.keep:
        times.save()
        print(f"kept in {times.file}", file=sys.stderr)
    if options.json:
        write({**about, "compute": options.compute, "products": rows}, options.json)
    return 0


def _table(weights: str, shape: tuple[int, int], found: Any, counts: Sequence[int]) -> list[dict[str, Any]]:
    """Prints the times of a shape, the least of each column marked; also returns them."""
    print(f"\n{weights} {shape[0]}x{shape[1]}" + " " * 8 + "".join(f"{count:>10}" for count in counts))
    # Forms for few rows alone leave a column of many rows empty.
    timed = [count for count in counts if any(count in times for times in found.values())]
    least = {count: min(times[count] for times in found.values() if count in times) for count in timed}
    rows = []
    for name in FORMS:
        if name in found:
            times = found[name]
            cells = [_cell(times.get(count), least.get(count)) for count in counts]
            print(f"  {name:<18}" + "".join(f"{cell:>10}" for cell in cells))
            microseconds = {str(count): round(1e6 * seconds, 1) for count, seconds in times.items()}
            rows.append({"weights": weights, "shape": list(shape), "form": name, "microseconds": microseconds})
    sys.stdout.flush()
    return rows


def _cell(seconds: float | None, least: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{1e6 * seconds:,.0f}{'*' if seconds == least else ' '}"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=_shape, default=[_shape(each) for each in SHAPES], metavar="INxOUT")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16], metavar="N")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--compute", choices=("float32", "bfloat16"), default="float32", help="type of the rows")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for a shape, compiling left out (default: 2)")
    parser.add_argument("--keep", action="store_true", help="keep the times for sessions on this machine")
    parser.add_argument("--json", metavar="FILE", help="write the report there; - is standard output")
    options = parser.parse_args(argv)
    if any(count < 1 for count in options.rows):
        raise UserError(f"--rows has {min(options.rows)}; give positive numbers")
    return options


def _shape(text: str) -> tuple[int, int]:
    try:
        size_in, size_out = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no shape; give one such as 384x1024") from None
    if size_in < 1 or size_out < 1:
        raise argparse.ArgumentTypeError(f"'{text}' has a size below 1; give one such as 384x1024")
    return size_in, size_out


if __name__ == "__main__":
    exit_cleanly(main)
