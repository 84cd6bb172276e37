"""Kills a training run again and again, damages its checkpoints, and shows that the losses are those of a quiet run.

    python benchmarks/kills.py [--kills 50] [--seed 0] [--folder DIR] [--json FILE]

A small run is started, killed with SIGKILL and resumed, until it was killed as often as asked; then it runs to its end.
Of three kills one comes at a random moment (start included), one as soon as a checkpoint is being written, and one a
random moment after that. Before every other resumption a file of the newest checkpoint is cut short or has a bit
flipped, if there is one before it. A checkpoint that was damaged must be named on stderr and never be resumed from;
what is resumed from must be the newest of the others. In the end every line of metrics but for the times, and every
weight, must equal those of a run that was left alone. Exit status 1 if anything is otherwise.
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.report import header, write

from lin_jax.errors import exit_cleanly
from lin_jax.models.params import params_fingerprint, params_of
from lin_jax.training.checkpoint.files import checkpoint_folder, problem, saved_steps
from lin_jax.training.checkpoint.manifest import MANIFEST_FILE
from lin_jax.training.model_source import load_model
from lin_jax.training.monitoring.throughput import MACHINE_FIGURES
from lin_jax.training.monitoring.trackers import METRICS_FILE, read_metrics

ROOT = Path(__file__).parents[1]
EVERY = 6
# Steps that a kill may come after: enough for two checkpoints, and few enough for the run to last for all kills.
STRIDES = (2 * EVERY + 1, 30)
MOMENTS = ("at a random moment", "as a write begins", "during a write")
SETTINGS = {
    "training.log_every": 1,
    "training.checkpoint_every": EVERY,
    "training.evaluate_every": 2 * EVERY,
    "training.keep_checkpoints": 3,
    "data.max_bytes": 60000,
    "data.validation_batches": 1,
}
# Starting takes most of the time; programs are compiled once, and not for speed.
ENVIRONMENT = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


@dataclass
class Tally:
    """What happened.

    Attributes:
        kills: by moment.
        during_writes: kills that left an unfinished checkpoint.
        damaged: checkpoints damaged, by how.
        found: of those, how many a resumed run named.
        resumes: resumptions from a checkpoint.
        repeated: steps taken again, for each resumption from the newest checkpoint.
        repeated_after_damage: the same for resumptions that had to pass a damaged one over.
        wrong: what must not happen, in words.
    """

    kills: Counter[str] = field(default_factory=Counter)
    during_writes: int = 0
    damaged: Counter[str] = field(default_factory=Counter)
    found: int = 0
    resumes: int = 0
    repeated: list[int] = field(default_factory=list)
    repeated_after_damage: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class Victim:
    """The run that is killed.

    Args:
        folder: its run folder.
        steps: of the whole run.
        cache: folder for compiled programs.
        chance: random numbers.
    """

    def __init__(self, folder: Path, steps: int, cache: Path, chance: random.Random) -> None:
        self.folder, self.steps, self.cache, self.chance = folder, steps, cache, chance
        self.tally = Tally()
        self.bad: set[int] = set()
        self.passed_over = False
        self.log = folder.with_suffix(".stderr")

    def start(self) -> subprocess.Popen[bytes]:
        """Begins the run, or goes on with it if it has a checkpoint."""
        return launch(self.folder, self.steps, self.cache, self.log, resume=bool(saved_steps(self.folder)))

    def step(self) -> int:
        """The step of the newest line of metrics."""
        lines = read_metrics(self.folder / METRICS_FILE)
        return lines[-1]["step"] if lines else 0

    def kill(self, moment: str) -> None:
        """Starts the run and kills it, then looks at what it resumed from."""
        expected, before = self._expected(), self.step()
        process = self.start()
        self._wait_for(process, moment, expected or 0)
        process.send_signal(signal.SIGKILL)
        process.wait()
        self.tally.kills[moment] += 1
        self.tally.during_writes += bool(list(checkpoint_folder(self.folder).glob("*tmp*")))
        self._account(expected, before)

    def finish(self) -> None:
        """Lets the run come to its end."""
        expected, before = self._expected(), self.step()
        if self.start().wait():
            self.tally.wrong.append(f"the last resumption failed: {self.log.read_text()[-500:]}")
        self._account(expected, before)
        if self.bad:
            self.tally.wrong.append(f"damage to steps {sorted(self.bad)} was never named")

    def damage(self) -> None:
        """Damages a file of the newest checkpoint, if another one is left to go on from."""
        steps = [step for step in saved_steps(self.folder) if step not in self.bad]
        if self.bad or len(steps) < 2 or problem(self._path(steps[-2])) is not None:
            return
        folder = self._path(steps[-1])
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.parent != folder)
        victim = self.chance.choice([*files, folder / MANIFEST_FILE])
        content, how = bytearray(victim.read_bytes()), self.chance.choice(("cut short", "bit flipped"))
        if how == "cut short":
            del content[self.chance.randrange(len(content)) :]
        else:
            content[self.chance.randrange(len(content))] ^= 1 << self.chance.randrange(8)
        victim.write_bytes(content)
        self.tally.damaged[how] += 1
        self.bad.add(steps[-1])

    def _path(self, step: int) -> Path:
        return checkpoint_folder(self.folder) / str(step)

    def _expected(self) -> int | None:
        """The step that the run must resume from: the newest that was not damaged."""
        return max((step for step in saved_steps(self.folder) if step not in self.bad), default=None)

    def _wait_for(self, process: subprocess.Popen[bytes], moment: str, begin: int) -> None:
        """Returns when it is time to kill, or the process has ended."""
        target = min(begin + self.chance.randint(*STRIDES), self.steps - 1)
        writes = checkpoint_folder(self.folder)
        # Now and then anywhere in the start.
        early = moment == MOMENTS[0] and self.chance.random() < 0.3
        latest = time.monotonic() + self.chance.uniform(0, 8) if early else float("inf")
        while process.poll() is None and time.monotonic() < latest:
            step = self.step() if self.log.read_text().count("tokens/s") else begin
            if moment == MOMENTS[0] and step >= target:
                time.sleep(self.chance.uniform(0, 0.05))
                return
            if moment != MOMENTS[0] and step >= target and any(writes.glob("*tmp*")):
                time.sleep(self.chance.uniform(0, 0.08) if moment == MOMENTS[2] else 0)
                return
            time.sleep(0.001)

    def _account(self, expected: int | None, before: int) -> None:
        """Looks at what the process that has just ended said, and enters it."""
        said = self.log.read_text()
        for step in sorted(self.bad):
            if f"{self._path(step)} cannot be read" in said:
                self.tally.found += 1
                self.bad.remove(step)
                self.passed_over = True
        if not (resumed := re.search(r"step (\d+): going on from", said)):
            return
        step = int(resumed[1])
        self.tally.resumes += 1
        again = self.tally.repeated_after_damage if self.passed_over else self.tally.repeated
        again.append(max(before - step, 0))
        self.passed_over = False
        if step in self.bad or step != expected:
            self.tally.wrong.append(f"resumed from step {step} instead of {expected}")


def launch(folder: Path, steps: int, cache: Path, log: Path, *, resume: bool = False) -> subprocess.Popen[bytes]:
    """The training script in a process of its own."""
    settings = {**SETTINGS, "output": folder, "training.steps": steps}
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, ROOT / "train.py", ROOT / "configs" / "tiny.yaml", *options]
    environment = os.environ | ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    with log.open("wb") as file:
        return subprocess.Popen([*command, *["--resume"] * resume], stderr=file, env=environment)


def differences(one: Path, other: Path) -> list[str]:
    """What two runs do not have in common: lines of metrics but for their times, and weights."""
    found, expected = (
        [{name: line[name] for name in line.keys() - MACHINE_FIGURES} for line in read_metrics(run / METRICS_FILE)]
        for run in (one, other)
    )
    wrong = [
        f"line {index}: {a} is not {b}" for index, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b
    ]
    if len(found) != len(expected):
        wrong.append(f"{len(found)} lines of metrics instead of {len(expected)}")
    weights = [params_fingerprint(params_of(load_model(run)[0])) for run in (one, other)]
    return wrong + (["the weights differ"] if weights[0] != weights[1] else [])


def measure(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Does it all, and reports."""
    chance, began = random.Random(seed), time.monotonic()
    steps = 8 * EVERY + STRIDES[1] * kills
    cache, quiet = folder / "compiled", folder / "quiet"
    alone = launch(quiet, steps, cache, quiet.with_suffix(".stderr"))
    victim = Victim(folder / "killed", steps, cache, chance)
    for index in range(kills):
        victim.kill(MOMENTS[index % len(MOMENTS)])
        if index % 2 == 0:
            victim.damage()
        print(f"kill {index + 1} of {kills}: at step {victim.step()} of {steps}", file=sys.stderr)
    victim.finish()
    tally = victim.tally
    if alone.wait():
        tally.wrong.append(f"the quiet run failed: {quiet.with_suffix('.stderr').read_text()[-500:]}")
    unequal = differences(victim.folder, quiet)
    return {
        "steps": steps,
        "checkpoint_every": EVERY,
        "seed": seed,
        "kills": sum(tally.kills.values()),
        "kills_by_moment": dict(tally.kills),
        "kills_during_a_write": tally.during_writes,
        "damaged": dict(tally.damaged),
        "damage_found": tally.found,
        "resumes": tally.resumes,
        "steps_repeated": sum(tally.repeated) + sum(tally.repeated_after_damage),
        "most_steps_repeated": max(tally.repeated, default=0),
        "most_steps_repeated_after_damage": max(tally.repeated_after_damage, default=0),
        "losses_equal": not unequal,
        "wrong": tally.wrong + unequal[:5],
        "seconds": round(time.monotonic() - began, 1),
    }


def table(report: dict[str, Any]) -> str:
    """The report for a person."""
    rows = {
        "kills": report["kills"],
        "of them while a checkpoint was being written": report["kills_during_a_write"],
        "checkpoints damaged": sum(report["damaged"].values()),
        "of them named when resuming": report["damage_found"],
        "resumptions from a checkpoint": report["resumes"],
        "steps of the run": report["steps"],
        "steps between checkpoints": report["checkpoint_every"],
        "steps repeated in all": report["steps_repeated"],
        "at the most after a kill": report["most_steps_repeated"],
        "at the most after a kill and damage": report["most_steps_repeated_after_damage"],
        "metrics and weights equal the quiet run's": "yes" if report["losses_equal"] else "NO",
        "anything wrong": "; ".join(report["wrong"]) or "no",
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options of a command line."""
    parser = argparse.ArgumentParser(description="Kills a training run, damages its checkpoints, compares its losses.")
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="how often to kill it (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the damage (default: 0)")
    parser.add_argument("--folder", metavar="DIR", help="where to run (default: a temporary folder)")
    parser.add_argument("--json", metavar="FILE", help="write the figures here; - prints them instead of the table")
    return parser.parse_args(argv)


def main() -> int:
    """Runs the command line; 1 if anything went wrong."""
    options = parse()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        report = {**header("kills"), **measure(options.kills, options.seed, folder)}
    if options.json != "-":
        print(table(report))
    if options.json is not None:
        write(report, options.json)
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    exit_cleanly(main)
