"""Command `plot`: draws the curves of one run, or of several in one picture."""

import sys
from collections.abc import Sequence
from pathlib import Path

from lin_jax.errors import OptionParser
from lin_jax.training.monitoring.plot import CURVES_FILE, draw, read_curves


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status.

    Args:
        argv: the command line; None takes the process's own.
    """
    parser = OptionParser(prog="python -m lin_jax plot", description="Draws the curves of training runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder of a train.py run")
    parser.add_argument(
        "--output", type=Path, help=f"the picture (.png, .svg, .pdf); without it, {CURVES_FILE} in the first folder"
    )
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    path = options.output or options.runs[0] / CURVES_FILE
    draw(read_curves(options.runs), path)
    print(path)
    return 0
