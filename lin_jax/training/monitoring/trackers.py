"""Trackers of metrics: a JSON line each, TensorBoard, and what else is asked for, behind one small interface."""

import json
import math
import os
import socket
import struct
import time
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import jax

from lin_jax.extras import require
from lin_jax.files import write_durably
from lin_jax.training.config import RunConfig, plain
from lin_jax.training.hooks import Figures, Hook, Training
from lin_jax.training.monitoring.wandb import WeightsAndBiases

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class Tracker(Protocol):
    """Takes the figures of a step."""

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Records figures by name."""

    def close(self) -> None:
        """Records what is still on its way."""


class JsonLines:
    """One JSON object a line, on disk as soon as it is logged.

    A resumed run's file reads like that of an uninterrupted one: lines that the restored checkpoint does not know
    are dropped, and so is the validation at its own step, which the loop repeats.

    Args:
        path: the file.
        resumed_at: step of the restored checkpoint; None begins a new file.
    """

    def __init__(self, path: Path, resumed_at: int | None = None) -> None:
        self.seconds = 0.0
        kept = [] if resumed_at is None else [line for line in read_metrics(path) if _known(line, resumed_at)]
        for line in kept:
            self.seconds = line.get("seconds", self.seconds)
        write_durably(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("ab", buffering=0)

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Appends a line.

        Raises:
            OSError: the disk has not taken it.
        """
        line = {"step": step, **{name: _writable(value) for name, value in figures.items()}}
        _write(self._file, json.dumps(line).encode() + b"\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoard:
    """Event files that TensorBoard reads; it hides what an interrupted run wrote after its checkpoint.

    Written here and now: the library's own writer does it in a thread, which a full disk ends without a word, and then
    waits for it forever.
    """

    def __init__(self, folder: Path, resumed_at: int | None = None) -> None:
        # Imported here: it takes its time, and reading configurations does not need it.
        SessionLog = require("tensorboardX.proto.event_pb2", "TensorBoard's event files").SessionLog
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("ab", buffering=0)
        begin = 0 if resumed_at is None else resumed_at + 1
        started = SessionLog(status=SessionLog.START)
        _write(self._file, _event(begin, file_version="brain.Event:2") + _event(begin, session_log=started))

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Adds a point to the curve of each figure.

        Raises:
            OSError: the disk has not taken it.
        """
        from tensorboardX.summary import scalar

        events = (_event(step, summary=scalar(name, value)) for name, value in figures.items())
        _write(self._file, b"".join(events))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class Trackers(Hook):
    """Several trackers as one hook.

    Attributes:
        seconds: training time of the run's earlier parts.
    """

    def __init__(self, *trackers: Tracker, seconds: float = 0.0) -> None:
        self._trackers = trackers
        self.seconds = seconds

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Records figures everywhere."""
        for tracker in self._trackers:
            tracker.log(step, figures)

    def on_log(self, training: Training, figures: Figures) -> None:
        """Records figures of a step."""
        self.log(training.step, figures)

    def on_validation(self, training: Training, figures: Figures) -> None:
        """Records figures of a validation, under names that begin with `validation_`."""
        self.log(training.step, {f"validation_{name}": value for name, value in figures.items()})

    def close(self) -> None:
        """Closes all."""
        for tracker in self._trackers:
            tracker.close()


def open_trackers(folder: Path, config: RunConfig, resumed_at: int | None = None) -> Trackers:
    """The trackers of a run; none in all but the first of several processes.

    Args:
        folder: the run's folder.
        config: the run.
        resumed_at: step of the restored checkpoint; None begins anew.
    """
    if jax.process_index() != 0:
        return Trackers()
    lines = JsonLines(folder / METRICS_FILE, resumed_at)
    trackers: list[Tracker] = [lines, TensorBoard(folder / TENSORBOARD_FOLDER, resumed_at)]
    if config.training.wandb.project is not None:
        trackers.append(WeightsAndBiases(config.training.wandb, folder, plain(config)))
    return Trackers(*trackers, seconds=lines.seconds)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a torn last line, left by a killed run, is skipped."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def _writable(value: float) -> float | None:
    """JSON has no word for what is no number."""
    return value if math.isfinite(value) else None


def _known(line: dict[str, Any], step: int) -> bool:
    return line["step"] < step or (line["step"] == step and "validation_loss" not in line)


def _write(file: FileIO, content: bytes) -> None:
    """Writes all of it to a file without a buffer: what a full disk does not take is not tried again later."""
    while content:
        content = content[file.write(content) :]


def _event(step: int, **what: Any) -> bytes:
    """An event as a record of an event file: its length, itself, and a checksum of each."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    content = Event(step=step, wall_time=time.time(), **what).SerializeToString()
    length = struct.pack("<Q", len(content))
    checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, content)]
    return length + checksums[0] + content + checksums[1]
