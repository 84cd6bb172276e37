"""Command `demo`: a softmax Transformer becomes linear, loses next to nothing, and decodes faster; with a report."""

import argparse
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from lin_jax.data import read_documents
from lin_jax.decoding.autotune.prompts import held_out_prompts
from lin_jax.demo.context import measure_context
from lin_jax.demo.decoding import measure_decoding
from lin_jax.demo.figures import build_report
from lin_jax.demo.ledger import Ledger, TrainingStoppedError
from lin_jax.demo.progress import say
from lin_jax.demo.quality import measure_quality
from lin_jax.demo.report import write_report
from lin_jax.demo.runs import BEST, STUDENTS, DemoRuns, find_model, run_all
from lin_jax.devices import devices_shown, keep_freed_memory
from lin_jax.errors import OptionParser, UserError
from lin_jax.files import write_durably
from lin_jax.session import Session
from lin_jax.training.config import plain
from lin_jax.user_cache import keep_programs

Part = tuple[str, str, Callable[[], dict[str, Any]]]


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, linearizes, decodes, reports; what an earlier, interrupted call has finished is kept.

    Args:
        argv: the command line; None takes the process's own.
    """
    options = _parse(argv)
    keep_freed_memory()
    # A part that is begun again, the demo on another text, and decode.py afterwards compile less.
    keep_programs()
    cpu = devices_shown()
    say(f"on {cpu}")
    folder = Path(options.output)
    if options.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    runs = _runs(options, folder)
    ledger = Ledger.open(folder, _settings(options, runs, cpu))
    parts = list(_parts(options, runs))
    try:
        for number, (name, title, work) in enumerate(parts, 1):
            say(f"{number}/{len(parts)} {title}")
            if name in ledger.results:
                say(f"    done before, in {ledger.seconds[name]:.0f} s; --fresh begins anew")
                continue
            with ledger.timed(name):
                result = work()
            ledger.finish(name, result)
            say(f"    {ledger.seconds[name]:.0f} s")
    except TrainingStoppedError as stop:
        say("stopped; the same command goes on from here")
        return stop.status
    except KeyboardInterrupt:
        say("stopped; the same command goes on from the last finished part")
        raise
    _finish(options, runs, ledger, cpu)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OptionParser(prog="python -m lin_jax demo", description=__doc__)
    parser.add_argument("--model", metavar="PLACE", help="pretrained softmax model in place of one that is trained")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer of a file of llama2.c")
    parser.add_argument("--data", metavar="PLACE", help="file or folder of text (default: Python's standard library)")
    parser.add_argument("--output", default="runs/demo", metavar="DIR", help="where everything goes")
    parser.add_argument("--fresh", action="store_true", help="begin anew, deleting what an earlier call has left")
    parser.add_argument("--config", default="configs/demo.yaml", help="the teacher's training run, and the text")
    parser.add_argument("--students-config", default="configs/demo_students.yaml", help="the students' training runs")
    parser.add_argument("--heads-config", default="configs/demo_heads.yaml", help="the draft head's training run")
    parser.add_argument("--prompts", type=int, default=10, metavar="N", help="held-out prompts to decode")
    parser.add_argument("--new-tokens", type=int, default=192, metavar="N", help="tokens to write for each of them")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="times that speed is measured")
    parser.add_argument(
        "--contexts",
        type=int,
        nargs="+",
        default=[256, 1024, 4096, 16384],
        metavar="N",
        help="tokens of the texts after which a token is timed",
    )
    options = parser.parse_args(argv)
    for name, least in (("prompts", 1), ("new_tokens", 2), ("rounds", 1)):
        if getattr(options, name) < least:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}; give at least {least}")
    return options


def _runs(options: argparse.Namespace, folder: Path) -> DemoRuns:
    given = None if options.model is None else find_model(options.model, options.tokenizer)
    files = (options.config, options.students_config, options.heads_config)
    runs = DemoRuns.load(folder, files, options.data, given)
    if given is not None:
        # A wrong one is found out at once, and one that lacks a tokenizer.
        runs.source.tokenizer(runs.tokenizer)
    if options.data is not None and not runs.data.is_remote:
        read_documents(replace(runs.data, max_bytes=1))
    return runs


def _settings(options: argparse.Namespace, runs: DemoRuns, cpu: str) -> dict[str, Any]:
    """Everything that results depend on, by the names of options; a folder may be moved."""
    return {
        "--model": options.model,
        "--tokenizer": options.tokenizer,
        "--data": options.data,
        "--config": plain(replace(runs.teacher, output="")),
        "--students-config": [plain(each) for each in runs.students],
        "--heads-config": plain(runs.heads),
        "--prompts": options.prompts,
        "--new-tokens": options.new_tokens,
        "--rounds": options.rounds,
        "--contexts": options.contexts,
        "machine": cpu,
    }


def _parts(options: argparse.Namespace, runs: DemoRuns) -> Iterator[Part]:
    """Name, title and work of each part, in order."""

    def trained(configs: Callable[[], Sequence[Any]]) -> Callable[[], dict[str, Any]]:
        def work() -> dict[str, Any]:
            # Configurations read what the parts before have left.
            run_all(configs())
            return {}

        return work

    if runs.given is None:
        yield "teacher", "training the softmax teacher", trained(lambda: [runs.teacher])
    for name in STUDENTS:
        yield name, f"linearizing it: {name}", trained(partial(runs.student_runs, name))
    yield "quality", "perplexity of all of them on held-out text", lambda: measure_quality(runs)
    yield "head", f"training a draft head on {BEST}", trained(lambda: [runs.head_run()])
    subjects = _Subjects(runs, options.prompts)
    yield "decoding", "decoding with softmax, plainly, and with drafts, in turn", lambda: _decode(options, subjects)
    yield "context", "a token after long texts", lambda: _context(options, subjects)


class _Subjects:
    """Models that decode and prompts that they go on from, read once: what one part compiles is there for the next.

    Args:
        runs: finished ones.
        count: number of prompts.
    """

    def __init__(self, runs: DemoRuns, count: int) -> None:
        self.runs, self.count = runs, count

    @cached_property
    def student(self) -> Session:
        """The last student, and its draft head."""
        return Session.load(self.runs.student_folder(BEST))

    @cached_property
    def teacher(self) -> Session:
        """The softmax model."""
        return Session.load(self.runs.source.place, tokenizer=self.runs.tokenizer)

    @cached_property
    def prompts(self) -> list[list[int]]:
        """Prompts of the held-out text, each behind what begins a text."""
        tokenizer = self.student.tokenizer
        found = held_out_prompts(self.runs.data, tokenizer, self.count, self.count)
        return [[*tokenizer.begin_ids, *each] for each in found]


def _decode(options: argparse.Namespace, subjects: _Subjects) -> dict[str, Any]:
    student, teacher = subjects.student, subjects.teacher
    return measure_decoding(student, teacher, subjects.prompts, options.new_tokens, options.rounds)


def _context(options: argparse.Namespace, subjects: _Subjects) -> dict[str, Any]:
    text = [token for prompt in subjects.prompts for token in prompt]
    models = subjects.student.model, subjects.teacher.model
    return measure_context(*models, text, sorted(set(options.contexts)))


def _finish(options: argparse.Namespace, runs: DemoRuns, ledger: Ledger, cpu: str) -> None:
    """Writes the report, and tells the headline."""
    seconds = {name: ledger.seconds[name] for name in ledger.results}
    about = {
        "teacher": _described(runs),
        "text": runs.data.name,
        "cpu": cpu,
        "prompts": options.prompts,
        "new_tokens_per_prompt": options.new_tokens,
        "rounds": options.rounds,
    }
    report = build_report(ledger.results, seconds, about)
    write_durably(runs.folder / "report.json", json.dumps(report, indent=1) + "\n")
    write_report(runs.folder / "report.html", report, runs.source.tokenizer(runs.tokenizer))
    say(f"\n{report['headline']}.\n")
    say(f"open {runs.folder / 'report.html'}")
    say(f"or try: .venv/bin/python decode.py {runs.student_folder(BEST)} 'def main('")


def _described(runs: DemoRuns) -> str:
    """The teacher in a sentence without its full stop."""
    if runs.given is not None:
        return f"The teacher is {runs.given.place}, a pretrained softmax Transformer"
    tokens = runs.teacher.training.steps * runs.teacher.training.batch_size * runs.data.sequence_length
    return f"A small softmax Transformer was trained on {runs.data.name}, {tokens:,} tokens of it"
