"""Runs cells one after the other in a worker process, and keeps each result when it is finished."""

import gc
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.report import header
from lib.study.cells import Cell, Setup
from tqdm import tqdm

from lin_jax.cli.json_line import json_line
from lin_jax.data.sources.remote import is_remote
from lin_jax.errors import UserError

# Runs a cell by its name, and returns its status.
Start = Callable[[str], int]
STOPPED = 130
# Said behind the status by a process that takes no more cells.
LAST_ANSWER = "last"
# Kilobytes that a worker may have taken before another takes its place.
MOST_MEMORY = 5 * 2**20


@dataclass(frozen=True)
class Store:
    """Results of cells as files in a folder.

    Attributes:
        setup: of the study.
    """

    setup: Setup

    def file(self, name: str) -> Path:
        """The file of a cell's result."""
        return self.setup.scratch / "cells" / f"{name}.json"

    def record(self, name: str, cell: Cell) -> dict[str, Any] | None:
        """The record of a cell; None if there is none, or one of other settings."""
        try:
            found = json.loads(self.file(name).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return None
        return found if found.get("identity") == self.identity(cell) else None

    def identity(self, cell: Cell) -> dict[str, Any]:
        """Settings and sizes that a result is of, as JSON gives them back.

        Places are not among them: a local copy is the same text. Other texts are for another scratch folder.
        """
        found = {"settings": cell.settings, "sizes": vars(self.setup.sizes)}
        return json.loads(json.dumps(found))

    def adopt(self, file: Path, cells: Mapping[str, Cell]) -> list[str]:
        """Takes over results of an earlier report, those of the same settings that are not here yet.

        Args:
            file: the report's results.json.
            cells: of all parts.

        Returns:
            Names of the cells whose results were taken over.

        Raises:
            UserError: the file is not a report's.
        """
        try:
            there = json.loads(file.read_text(encoding="utf-8"))["cells"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"--from {file} is no results.json of a study; give that of an earlier report") from error
        taken = []
        for name, record in there.items():
            cell = cells.get(name)
            if cell is None or record.get("identity") != self.identity(cell) or self.record(name, cell) is not None:
                continue
            self._keep(name, record)
            taken.append(name)
        return taken

    def has_model(self, name: str) -> bool:
        """Whether the models that a cell has trained are still here."""
        part, _, rest = name.partition("/")
        return self.setup.folder(part, rest).is_dir()

    def begin(self, name: str, cell: Cell) -> None:
        """Notes what a cell is begun with; models that were begun with something else are removed."""
        file, own = self.setup.scratch / "cells" / f"{name}.begun", json.dumps(self.identity(cell))
        part, _, rest = name.partition("/")
        if file.exists() and file.read_text(encoding="utf-8") != own:
            shutil.rmtree(self.setup.folder(part, rest), ignore_errors=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(own, encoding="utf-8")

    def write(
        self, name: str, cell: Cell, result: Mapping[str, Any], seconds: float, processor_seconds: float = math.nan
    ) -> None:
        """Keeps a result, with the time that has passed and that of all processors; the file appears whole."""
        record = {
            **header("study"),
            "cell": name,
            "quick": self.setup.quick,
            "cpu": cpu(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "seconds": seconds,
            "processor_seconds": processor_seconds,
            "data": shown_places(self.setup.data),
            "identity": self.identity(cell),
            "result": result,
        }
        # NaN and infinities become null.
        self._keep(name, json.loads(json_line(record)))

    def _keep(self, name: str, record: Mapping[str, Any]) -> None:
        file = self.file(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.partial")
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        partial.replace(file)


def shown_places(data: Mapping[str, str]) -> dict[str, str]:
    """Places as a report names them: of what is on this machine, the last part of the path."""
    return {
        name: ",".join(each if is_remote(each) else Path(each).name for each in place.split(","))
        for name, place in data.items()
    }


def cpu() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def run_cell(store: Store, name: str, cell: Cell) -> None:
    """Runs a cell in this process, and keeps its result."""
    store.begin(name, cell)
    began, spent = time.perf_counter(), time.process_time()
    result = cell.run(store.setup)
    store.write(name, cell, result, time.perf_counter() - began, time.process_time() - spent)


def run_cells(store: Store, cells: Mapping[str, Cell], start: Start, note: Callable[[str], None]) -> list[str]:
    """Runs all cells that have no result yet, and again those whose models are gone and needed.

    A cell that fails does not stop the others, but for those that need it.

    Args:
        store: of results.
        cells: by name, what a cell needs before it.
        start: runs one of them.
        note: told before each, and at the end.

    Returns:
        Names of the cells that failed, or that need one that did.

    Raises:
        KeyboardInterrupt: it was stopped; called again, it goes on with the cell that it was at.
    """
    todo = _unfinished(store, cells)
    note(f"{len(cells)} cells, {len(cells) - len(todo)} of them finished before")
    lost = {name for name in todo if store.record(name, cells[name]) is not None}
    failed: list[str] = []
    pace = _Pace()
    for number, name in enumerate(todo, 1):
        cell = cells[name]
        if any(each in failed for each in cell.needs):
            failed.append(name)
            note(f"[{number}/{len(todo)}] {name}: left out, since what it needs has failed")
            continue
        if store.record(name, cell) is not None and (name not in lost or store.has_model(name)):
            # Another call, of other parts, needed it too.
            continue
        left = pace.seconds([cells[each] for each in todo[number - 1 :]])
        note(f"[{number}/{len(todo)}] {name}: {duration(pace.seconds([cell]))}; in all {duration(left)} left")
        began = time.perf_counter()
        status = start(name)
        if status in (STOPPED, -2):
            raise KeyboardInterrupt
        if status or store.record(name, cell) is None:
            failed.append(name)
            note(f"{name} failed with status {status}; it is tried again when this command is")
        else:
            pace.add(cell, time.perf_counter() - began)
    return failed


def _unfinished(store: Store, cells: Mapping[str, Cell]) -> list[str]:
    """Names of the cells to run, in order: without a result, or needed by one of these and without their models."""
    chosen: set[str] = set()
    needed: set[str] = set()
    # What a cell needs stands before it.
    for name, cell in reversed(cells.items()):
        if store.record(name, cell) is None or (name in needed and not store.has_model(name)):
            chosen.add(name)
            needed |= set(cell.needs)
    return [name for name in cells if name in chosen]


class _Pace:
    """Time that cells take on this machine, as a multiple of what is expected."""

    def __init__(self) -> None:
        self._expected = self._spent = 0.0

    def add(self, cell: Cell, seconds: float) -> None:
        """Counts a cell that is finished."""
        self._expected += 60 * cell.minutes
        self._spent += seconds

    def seconds(self, cells: Sequence[Cell]) -> float:
        """Seconds that cells are expected to take here."""
        factor = self._spent / self._expected if self._expected else 1.0
        return factor * sum(60 * cell.minutes for cell in cells)


class Worker:
    """A process that runs cells one after the other; where it has ended, the next cell has a new one.

    What cells share is imported, read and compiled once.

    Args:
        command: of the process, which reads names of cells and answers each with its status.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, name: str) -> int:
        """Runs a cell; where the process ends without an answer, its own status is the cell's."""
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(f"{name}\n")
            process.stdin.flush()
            status, *last = process.stdout.readline().split() or [str(STOPPED), LAST_ANSWER]
            if last:
                # An answer or not: this process has ended, perhaps by a signal.
                return int(status) if process.wait() == 0 else process.returncode
            return int(status)
        except KeyboardInterrupt:
            self.close()
            raise

    def close(self) -> None:
        """Ends the process, also in the midst of a cell."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def _running(self) -> "subprocess.Popen[str]":
        if self._process is None or self._process.poll() is not None:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self._process = subprocess.Popen([sys.executable, *self._command], **pipes)
        return self._process


def serve(store: Store, cells: Mapping[str, Cell]) -> int:
    """Runs the cells whose names are read, and answers each with its status: 0, or 1 or 2 for one that failed.

    It ends after a cell that failed, and where it has come to take much memory.
    """
    # What cells print is no answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        name, status = line.strip(), 0
        try:
            run_cell(store, name, cells[name])
        except UserError as error:
            status = 2
            print(f"error: {error}", file=sys.stderr)
        except Exception:
            status = 1
            traceback.print_exc()
        gc.collect()
        last = status or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > MOST_MEMORY
        print(status, *([LAST_ANSWER] if last else []), file=answers, flush=True)
        if last:
            break
    return 0


def duration(seconds: float) -> str:
    """Some seconds in words."""
    minutes = seconds / 60
    if minutes < 1:
        return f"about {max(round(seconds), 1)} s"
    return f"about {minutes:.0f} min" if minutes < 90 else f"about {minutes / 60:.1f} h"


def note(line: str) -> None:
    """Prints a line above any bar, with the time."""
    tqdm.write(f"{time.strftime('%H:%M:%S')}  {line}", file=sys.stderr)


def records(store: Store, cells: Mapping[str, Cell]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and records of the cells that are finished."""
    for name, cell in cells.items():
        if (found := store.record(name, cell)) is not None:
            yield name, found
