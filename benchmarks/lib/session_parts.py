"""Parts of a session on a machine that is lent for minutes: processes with a time limit each, and results kept at once.

It needs nothing but Python: a machine may be bare when a session begins.
"""

import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import IO, Any

ROOT = Path(__file__).parents[2]
# How a part ends.
DONE, FAILED, TOO_SLOW, NOT_BEGUN, INTERRUPTED = "done", "failed", "too slow", "not begun", "interrupted"
# A part begins only if so many seconds are left, or as many as it may take.
LEAST_SECONDS = 15.0
# Of its limit, that a part may take where others have left time over.
MOST_TIMES = 2.0
# Seconds between a polite signal and the one that cannot be refused, and between two looks at the clock on the screen.
GRACE, TICK = 2.0, 10.0
TAIL, LINE = 30, 500
OWN_REPORT = "{scratch}/{name}.json"


@dataclass(frozen=True)
class Part:
    """One question to the machine: a process with a time limit.

    Attributes:
        name: name in the results, by which it is chosen.
        command: words behind the Python interpreter; `{report}`, `{scratch}` and `{output}` in them are places.
        seconds: its time limit, and up to twice that where all the other parts keep theirs.
        arguments: further words on the machine that is asked.
        rehearsal: further words in their place for a rehearsal on a CPU.
        environment: further variables.
        table: lines of Markdown that tell its report.
        report: the JSON file that it writes; the default one is its own, and removed before another try.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    arguments: tuple[str, ...] = ()
    rehearsal: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    table: Callable[[Any], list[str]] = lambda report: []
    report: str = OWN_REPORT


@dataclass(frozen=True)
class Session:
    """Where and how parts run.

    Attributes:
        output: folder of the results, `session.json`, `summary.md` and `log.txt`.
        scratch: folder of what parts keep for themselves and for a later try: compiled programs, models.
        limit: seconds of all parts together.
        rehearsal: whether parts run with tiny sizes on a CPU.
        patience: how many times its limit a part may take.
        environment: variables of all parts.
        notes: lines of the summary.
    """

    output: Path
    scratch: Path
    limit: float
    rehearsal: bool = False
    patience: float = 1.0
    environment: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def file(self) -> Path:
        """The results."""
        return self.output / "session.json"

    def filled(self, part: Part, word: str) -> str:
        """A word of a part's command with the places filled in."""
        places = {"report": part.report, "name": part.name, "scratch": self.scratch, "output": self.output}
        for name, place in places.items():
            word = word.replace(f"{{{name}}}", str(place))
        return word

    def words(self, part: Part) -> list[str]:
        """A part's command."""
        words = (*part.command, *(part.rehearsal if self.rehearsal else part.arguments))
        return [sys.executable, *(self.filled(part, word) for word in words)]

    def report(self, part: Part) -> Any:
        """The JSON that a part has written; None if there is none that can be read."""
        try:
            return json.loads(Path(self.filled(part, part.report)).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None


def run_session(session: Session, parts: Sequence[Part], others: Sequence[Part] = ()) -> dict[str, Any]:
    """Runs all parts that are not done, one after another, and keeps what is known after each of them.

    Args:
        session: where and how.
        parts: the most valuable one first.
        others: parts that are not run, whose results of earlier tries the summary tells too.
    """
    results = read_results(session) or {"rehearsal": session.rehearsal, "seconds": 0.0, "parts": {}}
    began = time.monotonic()
    before = results["seconds"]
    for number, part in enumerate(parts):
        if state_of(results, part) == DONE:
            say(f"{part.name}: done already")
            continue
        left = session.limit - (time.monotonic() - began)
        own = session.patience * part.seconds
        later = [each for each in parts[number + 1 :] if state_of(results, each) != DONE]
        # What others have left over is for whoever needs it, within reason.
        spare = left - session.patience * sum(each.seconds for each in later)
        most = min(max(own, spare), MOST_TIMES * own)
        if left < min(own, LEAST_SECONDS):
            say(f"{part.name}: not begun, {max(left, 0):.0f} s are left")
            found = {"state": NOT_BEGUN, "seconds": 0.0, "last_line": f"{max(left, 0):.0f} s were left", "report": None}
        else:
            found = run_part(session, part, min(most, left), began)
        results["parts"][part.name] = found
        results["seconds"] = before + time.monotonic() - began
        keep(session, [*parts, *(each for each in others if each.name in results["parts"])], results)
        if found["state"] == INTERRUPTED:
            break
    return results


def state_of(results: Mapping[str, Any], part: Part) -> str:
    """How a part has ended."""
    return str(results["parts"].get(part.name, {}).get("state", NOT_BEGUN))


def read_results(session: Session) -> dict[str, Any] | None:
    """Results of an earlier try; None if there are none."""
    try:
        found: dict[str, Any] = json.loads(session.file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return found


def run_part(session: Session, part: Part, limit: float, began: float) -> dict[str, Any]:
    """Runs a part until it ends or its time is over; what it has written until then is kept.

    Args:
        session: where and how.
        part: the part.
        limit: seconds that it may take.
        began: when the session began, by the monotonic clock.
    """
    words = session.words(part)
    if part.report == OWN_REPORT:
        # Whatever lies there is from a try that failed.
        Path(session.filled(part, part.report)).unlink(missing_ok=True)
    left = session.limit - (time.monotonic() - began)
    say(f"\n{part.name}: at most {limit:.0f} s, {clock(left)} left for all\n  {shlex.join(words)}")
    environment = {**os.environ, **session.environment, **part.environment, "PYTHONUNBUFFERED": "1"}
    started, before = time.monotonic(), processor_seconds()
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None, "it is a pipe"
    lines: list[str] = []
    with (session.output / "log.txt").open("a", encoding="utf-8") as log:
        log.write(f"\n== {part.name}: {shlex.join(words)}\n")
        reader = Thread(target=_copy, args=(process.stdout, log, lines), daemon=True)
        reader.start()
        try:
            state = _wait(process, part.name, started + limit, began + session.limit)
        except KeyboardInterrupt:
            state = INTERRUPTED
        finally:
            _end(process)
            reader.join(GRACE)
    spent = time.monotonic() - started
    last = lines[-1] if lines else ""
    say(f"{part.name}: {state} after {spent:.0f} s" + ("" if state == DONE else f": {last}"))
    return {
        "state": state,
        "status": process.returncode,
        "seconds": spent,
        "processor_seconds": processor_seconds() - before,
        "limit": limit,
        "command": words,
        "last_line": last,
        "tail": lines[-TAIL:],
        "report": session.report(part),
    }


def _wait(process: subprocess.Popen[str], name: str, end: float, all_end: float) -> str:
    """Waits until a process ends or its time is over, and tells the time that is left."""
    while (left := end - time.monotonic()) > 0:
        try:
            return DONE if process.wait(min(TICK, left)) == 0 else FAILED
        except subprocess.TimeoutExpired:
            if left > TICK:
                say(f"  ({name}: {left - TICK:.0f} s left, {clock(all_end - time.monotonic())} for all)")
    return TOO_SLOW


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a process with all that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _copy(stream: IO[str], log: IO[str], lines: list[str]) -> None:
    """Copies lines to the log and the screen."""
    for line in stream:
        text = line.rstrip()
        if text:
            lines.append(text)
            log.write(f"{text}\n")
            log.flush()
            say(f"  | {text}")


def keep(session: Session, parts: Sequence[Part], results: Mapping[str, Any]) -> None:
    """Writes the results as JSON and as Markdown, each of them whole or not at all."""
    for name, text in {
        "session.json": json.dumps(results, indent=1),
        "summary.md": summary(session, parts, results),
    }.items():
        written = session.output / f"{name}.part"
        written.write_text(f"{text.rstrip()}\n", encoding="utf-8")
        written.replace(session.output / name)


def summary(session: Session, parts: Sequence[Part], results: Mapping[str, Any]) -> str:
    """The results in Markdown: what was asked and took how long, what failed and with which words, and the figures."""
    found = {part.name: results["parts"].get(part.name, {"state": NOT_BEGUN, "seconds": 0.0}) for part in parts}
    title = "Rehearsal of a session, tiny sizes on a CPU" if session.rehearsal else "Session on a device"
    lines = [f"# {title}", "", f"{results['seconds']:.0f} s in all.", ""]
    lines += ["| part | state | seconds | processor seconds | limit |", "| --- | --- | --- | --- | --- |"]
    for part in parts:
        each = found[part.name]
        spent = f"{each['seconds']:.0f} | {each.get('processor_seconds', 0):.0f}"
        lines.append(f"| {part.name} | {each['state']} | {spent} | {session.patience * part.seconds:.0f} |")
    wrong = [name for name, each in found.items() if each["state"] != DONE]
    if wrong:
        lines += ["", "## What is missing", ""]
        lines += [f"* {name}: {found[name]['state']}. {found[name].get('last_line', '')[:LINE]}" for name in wrong]
    lines += ["", *(f"* {note}" for note in session.notes)]
    for part in parts:
        if (rows := _rows(part, found[part.name].get("report"))) is not None:
            lines += ["", f"## {part.name}", "", *rows]
    return "\n".join(lines)


def _rows(part: Part, report: Any) -> list[str] | None:
    """A part's report in Markdown; None without one. What a killed part has written may lack anything."""
    if report is None:
        return None
    try:
        return part.table(report) or None
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as problem:
        return [f"The report could not be told ({type(problem).__name__}: {problem}); it is in `session.json`."]


def processor_seconds() -> float:
    """Processor time of all processes that have ended, in all threads."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    whole = max(int(seconds), 0)
    return f"{whole // 60}:{whole % 60:02}"


def say(line: str) -> None:
    """A line on the screen, at once."""
    print(line, flush=True)
