"""Right answers: of a causal model among the choices of questions, and of a classifier in its task."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lin_jax.cli.glue_predictions import example_scores
from lin_jax.data import Tokenizer
from lin_jax.data.glue.files import read_examples
from lin_jax.data.glue.tasks import glue_task
from lin_jax.decoding.scoring import ContinuationScorer
from lin_jax.errors import UserError
from lin_jax.evaluation.classification import scored
from lin_jax.progress_bar import progress_bar
from lin_jax.training.inputs import task_encoder
from lin_jax.training.model_source import ModelSource


class Question(NamedTuple):
    """A prompt, what may follow it, and the number of what is right."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


def choices_report(options: argparse.Namespace, subject: Any) -> dict[str, Any]:
    """Shares of questions whose right choice is the most probable one, as a whole and by its bytes."""
    questions = list(read_questions(options.choices))
    requests = [
        split_tokens(subject.tokenizer, question.prompt, choice)
        for question in questions
        for choice in question.choices
    ]
    scorer = ContinuationScorer(subject.model, batch_size=options.batch)
    with progress_bar(total=len(requests), desc="evaluating", unit="choice") as bar:
        scores = scorer.score(requests, bar.update)
    sums = iter([float(np.sum(each.log_probs, dtype=np.float64)) for each in scores])
    right = by_bytes = 0
    for question in questions:
        found = np.asarray([next(sums) for _ in question.choices])
        right += int(np.argmax(found)) == question.answer
        sizes = [max(len(choice.encode(errors="replace")), 1) for choice in question.choices]
        by_bytes += int(np.argmax(found / sizes)) == question.answer
    count = len(questions)
    return {
        "accuracy": right / count,
        "accuracy_by_bytes": by_bytes / count,
        "questions": count,
        "chance": float(np.mean([1 / len(question.choices) for question in questions])),
        "file": str(options.choices),
    }


def task_report(source: ModelSource) -> dict[str, Any]:
    """Metrics of a classification run on its task's validation sets."""
    config = source.run
    assert config.data.task is not None
    task, model = glue_task(config.data.task), source.model()
    encoder, report = task_encoder(config, task, source.tokenizer()), {"task": task.name, "step": source.step}
    for split in task.held_out:
        examples = read_examples(config.data.sources[0], task, split)
        scores = example_scores(model, encoder, examples, config.data.sequence_length, config.training.batch_size)
        labels = np.asarray([example.label for example in examples])
        labels = labels if task.is_regression else labels.astype(np.int64)
        figures = {**scored(scores, labels, task.metrics), "examples": len(examples)}
        report |= {f"{split.name}_{name}" if split.name else name: value for name, value in figures.items()}
    return report


def read_questions(file: str) -> Iterator[Question]:
    """Yields the questions of a file with a line of JSON for each.

    Raises:
        UserError: the file cannot be read, has no questions, or a line is none.
    """
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot read questions from {file}: {reason}; give a file of JSON lines") from None
    filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not filled:
        raise UserError(f"{file} holds no questions; give a line of JSON for each")
    for number, line in filled:
        yield _question(line, f"line {number} of {file}")


def _question(line: str, place: str) -> Question:
    try:
        given = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place} is no JSON: {error}; mend it") from None
    given = given if isinstance(given, dict) else {}
    prompt, choices, answer = given.get("prompt"), given.get("choices"), given.get("answer")
    texts = [each for each in choices if isinstance(each, str) and each] if isinstance(choices, list) else []
    if not isinstance(prompt, str) or len(texts) < 2 or texts != choices:
        raise UserError(f"{place} is no question; give a text as 'prompt', and two texts or more as 'choices'")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(texts):
        raise UserError(f"the 'answer' of {place} is {answer!r}; give a number from 0 to {len(texts) - 1}")
    return Question(prompt, tuple(texts), answer)


def split_tokens(tokenizer: Tokenizer, prompt: str, choice: str) -> tuple[list[int], list[int]]:
    """Tokens of a prompt and of what follows it, as they are in the text of both.

    Spaces at the end of the prompt belong to the choice, as tokenizers have them in front of a word.
    """
    bare = prompt.rstrip(" ")
    known = [token for token in (tokenizer.bos_id, tokenizer.eos_id) if token is not None]
    begin = list(tokenizer.begin_ids) or ([] if bare else known[:1])
    if not begin and not bare:
        raise UserError("a prompt is empty, and the tokenizer has no token to begin a text with; give a prompt")
    context = [*begin, *tokenizer.encode(bare).tolist()]
    whole = [*begin, *tokenizer.encode(prompt + choice).tolist()]
    return context, whole[len(context) :]
