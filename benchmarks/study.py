"""The paper's study: every attention as a student, from scratch, in encoders, on long texts, with drafts, and ablated.

    python benchmarks/study.py                                  # all of it: many hours
    python benchmarks/study.py --parts linearize ablations      # some parts, and what they need
    python benchmarks/study.py --short                          # every claim on a small budget: 1.5 hours of one core
    python benchmarks/study.py --quick                          # tiny models, to see that everything runs
    python benchmarks/study.py --only yoso --list               # cells by a word in their names, with their minutes
    python benchmarks/study.py --short --from docs/study/results.json   # goes on from a report, on any machine

Each cell is one training or evaluation, and its result is kept when it is finished: after Ctrl-C, or when a part is
added, the same command goes on with the cell that it was at. First come some cells for every claim, then every
attention of the paper, then more seeds, teachers and tasks, and last what --short leaves out. The report is written
between cells and at the end: README.md, results.json and plots in --output. Texts, models and tasks are fetched by
public names, once; --data puts local copies in their stead: --data stories=FILE books=FOLDER glue=FOLDER
stories260K=FILE stories260K-tokenizer=FILE.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from lib.study.cells import Cell, Setup
from lib.study.pages import CLAIMS_MARK, check_claims, write_claims, write_study
from lib.study.registry import PARTS, all_cells, chosen_cells
from lib.study.runner import Start, Store, Worker, duration, note, run_cells, serve, shown_places

from lin_jax.devices import keep_freed_memory
from lin_jax.errors import OptionParser, UserError, exit_cleanly
from lin_jax.user_cache import keep_programs

FULL, QUICK = "docs/study", "runs/study-quick/report"
# Plots take seconds: between cells, the report is not written more often.
REPORT_SECONDS = 300.0


def main() -> int:
    """Runs the chosen cells and writes the report; the status is 1 if a cell failed."""
    options = parse(sys.argv[1:])
    setup = setup_of(options)
    if options.claims:
        if options.quick:
            raise UserError("--claims with --quick would publish figures that say nothing; leave one of them out")
        check_claims(options.claims)
    store, output = Store(setup), Path(options.output or (QUICK if options.quick else FULL))
    if options.worker:
        # Programs that are alike are compiled once, by whichever process.
        keep_programs()
        keep_freed_memory()
        return serve(store, all_cells(setup))
    if options.results:
        taken = store.adopt(Path(options.results), all_cells(setup))
        note(f"{len(taken)} results taken over from {options.results}")
    chosen = chosen_cells(setup, options.parts, options.only)
    if options.list:
        for name, cell in chosen.items():
            done = "finished" if store.record(name, cell) is not None else duration(60 * cell.minutes)
            print(f"{name:70} {done}")
        return 0
    worker = Worker(worker_command(options))
    try:
        return study(store, chosen, worker, output, shown_command(options), options.claims)
    finally:
        worker.close()


def study(
    store: Store, cells: Mapping[str, Cell], start: Start, output: Path, command: str, claims: Path | None = None
) -> int:
    """Runs cells, writes the report now and then and at the end, and says where it is; claims go to one more file."""
    everything, written = all_cells(store.setup), time.monotonic()

    def started(name: str) -> int:
        nonlocal written
        status = start(name)
        if time.monotonic() - written > REPORT_SECONDS:
            write_study(store, everything, output, command)
            written = time.monotonic()
        return status

    try:
        failed = run_cells(store, cells, started, note)
    finally:
        write_study(store, everything, output, command)
        note(f"the report is {output / 'README.md'}; the same command goes on with what is missing")
        if claims is not None:
            write_claims(store, everything, claims)
    return 1 if failed else 0


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="tiny models and few steps; its figures say nothing")
    sizes.add_argument("--short", action="store_true", help="every claim, with a seventh of the training")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=tuple(PARTS), metavar="PART")
    parser.add_argument(
        "--only", nargs="+", default=(), metavar="WORD", help="cells alone with such a word in their name"
    )
    parser.add_argument("--list", action="store_true", help="list the cells, and run none")
    parser.add_argument(
        "--data", nargs="+", default=(), metavar="NAME=PLACE", help="local copies; an unknown name lists all"
    )
    parser.add_argument(
        "--from",
        dest="results",
        metavar="FILE",
        help="results.json of an earlier report, whose cells are not run again",
    )
    parser.add_argument(
        "--claims",
        type=Path,
        metavar="FILE",
        help=f"whose part between two lines {CLAIMS_MARK} becomes the table of claims, such as README.md",
    )
    parser.add_argument("--output", metavar="FOLDER", help=f"of the report ({FULL}; quick: {QUICK})")
    parser.add_argument(
        "--scratch", metavar="FOLDER", help="of models and results (runs/study; also with -short or -quick)"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def setup_of(options: argparse.Namespace) -> Setup:
    """Where and with what cells run.

    Raises:
        UserError: a place has no name, or one that is unknown.
    """
    for each in options.data:
        if not all(each.partition("=")):
            raise UserError(f"--data {each} names no place; give NAME=PLACE")
    data = dict(each.split("=", 1) for each in options.data)
    scratch = options.scratch or "-".join(["runs/study", *_chosen_sizes(options)])
    setup = Setup(Path(scratch), options.quick, data, options.short)
    assert setup.places
    return setup


def _chosen_sizes(options: argparse.Namespace) -> list[str]:
    """The option that makes the study smaller, if one does."""
    return [name for name in ("short", "quick") if getattr(options, name)]


def shown_command(options: argparse.Namespace) -> str:
    """The command as the report has it, without the folders of this machine."""
    words = ["python", "benchmarks/study.py", *(f"--{each}" for each in _chosen_sizes(options))]
    if tuple(options.parts) != tuple(PARTS):
        words += ["--parts", *options.parts]
    if options.only:
        words += ["--only", *options.only]
    if options.data:
        data = shown_places(dict(each.split("=", 1) for each in options.data))
        words += ["--data", *(f"{name}={place}" for name, place in data.items())]
    return shlex.join(words)


def worker_command(options: argparse.Namespace) -> list[str]:
    """The command of a process that runs cells."""
    words = [__file__, *(f"--{each}" for each in _chosen_sizes(options))]
    if options.data:
        words += ["--data", *options.data]
    if options.scratch:
        words += ["--scratch", options.scratch]
    return [*words, "--worker"]


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
