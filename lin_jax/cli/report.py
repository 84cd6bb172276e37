"""Command `report`: students of a teacher, side by side, on held-out text."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lin_jax.cli.measured_text import ALL
from lin_jax.data import Corpus, DataConfig, validation_batches
from lin_jax.errors import OptionParser, UserError

if TYPE_CHECKING:
    from lin_jax.training.model_source import ModelSource

# Tokens that rows have, as a multiple of those in training, so that the report shows what comes after.
_LONGER = 4


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status.

    Args:
        argv: the command line; None takes the process's own.
    """
    options = _parse(sys.argv[1:] if argv is None else argv)
    # Help and wrong options need not wait for the checkpoint library.
    from lin_jax.devices import device_kind
    from lin_jax.report.figures import STUDENT, TEACHER
    from lin_jax.report.measure import Trial, baselines, measure, prompts_of, window_of
    from lin_jax.report.pages import TABLE_FILE, markdown, write_pages
    from lin_jax.training.model_source import ModelSource

    device_kind()
    named = [(name, ModelSource.open(place)) for name, places in map(_student, options.students) for place in places]
    everywhere = [source.place.resolve() for _, source in named]
    if repeated := [place for place in everywhere if everywhere.count(place) > 1]:
        raise UserError(f"{repeated[0]} is there twice, and a model is no second seed of its own; name each place once")
    teacher = _candidate("teacher", ModelSource.open(options.teacher), TEACHER, options.tokenizer)
    students = [_candidate(name, source, STUDENT, options.tokenizer) for name, source in named]
    sources = [source for _, source in named]
    length = options.training_length or next((each.run.data.sequence_length for each in sources if each.is_run), 256)
    data, corpus = _text(options, sources, length)
    windows = options.window or [window_of(each.model.config.attention) for each in students]
    windowed, notes = baselines(teacher, [window for window in windows if window is not None])
    trial = Trial(
        text=data.name,
        batches=list(validation_batches(corpus, teacher.tokenizer, data, batch_size=options.batch)),
        prompts=prompts_of(corpus, teacher.tokenizer, options.prompts, options.prompt_tokens),
        training_length=length,
        new_tokens=options.new_tokens,
        rounds=options.rounds,
        ablate=not options.no_ablations,
    )
    report = measure(teacher, [*windowed, *students], trial, _note, notes)
    try:
        write_pages(report, options.output)
    except OSError as error:
        raise UserError(f"cannot write to {options.output}: {error.strerror}; give another --output") from error
    print(markdown(report))
    print(options.output / TABLE_FILE)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = OptionParser(
        prog="python -m lin_jax report",
        description="Compares students with their teacher on held-out text: report.json, report.md and a picture.",
    )
    parser.add_argument(
        "students",
        nargs="+",
        metavar="[NAME=]STUDENT[,STUDENT...]",
        help="run folder or Hugging Face folder of a student; several with commas are seeds of one",
    )
    parser.add_argument("--teacher", required=True, metavar="PLACE", help="run, Hugging Face folder or llama2.c file")
    parser.add_argument("--text", metavar="PLACE", help="file or folder of text (default: the student's held-out text)")
    parser.add_argument(
        "--document-separator",
        default=DataConfig.document_separator,
        metavar="MARK",
        help="what separates documents inside a file of --text (default: <|endoftext|>, where a file holds that)",
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer of a file of llama2.c")
    parser.add_argument("--output", type=Path, default=Path("report"), help="folder of the report (default: report)")
    parser.add_argument(
        "--training-length", type=int, metavar="N", help="tokens of rows in training (default: the student's, or 256)"
    )
    parser.add_argument(
        "--sequence-length", type=int, metavar="N", help=f"tokens of rows (default: {_LONGER} times those in training)"
    )
    parser.add_argument("--joined", action="store_true", help="rows are one text each, whatever documents they hold")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="rows in a batch (default: 8)")
    parser.add_argument("--batches", type=int, metavar="N", help="batches at the most (default: all of the text)")
    parser.add_argument("--prompts", type=int, default=32, metavar="N", help="prompts to continue (default: 32)")
    parser.add_argument("--prompt-tokens", type=int, default=32, metavar="N", help="tokens of a prompt (default: 32)")
    parser.add_argument(
        "--new-tokens", type=int, default=64, metavar="N", help="tokens of a continuation (default: 64)"
    )
    parser.add_argument(
        "--window",
        type=int,
        action="append",
        metavar="N",
        help="window of an untrained teacher to compare with, several times (default: each student's own)",
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds of speeds; 0 is none (default: 3)")
    parser.add_argument("--no-ablations", action="store_true", help="do not leave branches of attention out in turn")
    options = parser.parse_args(argv)
    for name in ("batch", "prompts", "prompt_tokens", "new_tokens", "training_length", "sequence_length", "batches"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; give at least 1")
    if options.rounds < 0:
        raise UserError(f"--rounds is {options.rounds}; give 0 or more")
    if any(window < 1 for window in options.window or ()):
        raise UserError(f"--window is {min(options.window)}; give at least 1")
    return options


def _student(word: str) -> tuple[str, list[str]]:
    """Name and places of a student; without a name, the end of its first place."""
    name, equals, places = word.partition("=")
    if not equals or "/" in name:
        name, places = "", word
    found = [place for place in places.split(",") if place]
    if not found:
        raise UserError(f"student '{word}' names no place; give NAME=FOLDER, or a folder")
    return name or "/".join(Path(found[0]).parts[-2:]), found


def _candidate(name: str, source: "ModelSource", kind: str, tokenizer: str | None) -> Any:
    from lin_jax.report.measure import Candidate
    from lin_jax.session import check_causal

    model = source.model()
    check_causal(model, str(source.place))
    known = source.tokenizer(tokenizer)
    return Candidate(name, str(source.place), kind, model, known, source.end_tokens(known))


def _text(options: argparse.Namespace, sources: Sequence["ModelSource"], length: int) -> tuple[DataConfig, Corpus]:
    """The held-out text: all of what is named, or what the first student's run held out."""
    cut: dict[str, Any] = {
        "sequence_length": options.sequence_length or _LONGER * length,
        "validation_batches": options.batches or ALL,
        "separate_documents": not options.joined,
    }
    if options.text is not None:
        data = DataConfig(options.text, document_separator=options.document_separator, **cut)
        return data, Corpus.open(data)
    run = next((each.run for each in sources if each.is_run), None)
    if run is None:
        raise UserError("no student is a run, and so there is no held-out text; give a text with --text")
    data = replace(run.data, **cut)
    return data, Corpus.open(data).split(data.validation_fraction)[1]


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
