"""Prompts of a command line: an argument, a file, or standard input, each taken as it is."""

import json
import sys
from pathlib import Path

from lin_jax.errors import UserError

STDIN = "-"
TABLES = (".jsonl", ".ndjson")
_BYTE_ORDER_MARK = "\ufeff"


def given_prompts(argument: str, file: str | None) -> list[str]:
    """The prompts of a command line, without a byte-order mark.

    Args:
        argument: the prompt, if there is no file.
        file: path of a prompt file, or `-` for standard input.

    Raises:
        UserError: the file holds no prompts, or cannot be read.
    """
    return [argument.removeprefix(_BYTE_ORDER_MARK)] if file is None else read_prompts(file)


def read_prompts(place: str | Path) -> list[str]:
    """Reads prompts: the field `prompt` of each line of a .jsonl file, else the whole file, or standard input, as one.

    A text is taken as it is, with its line ends and its last newline; only a byte-order mark in front is left out.

    Raises:
        UserError: there is no such file, or it does not hold prompts.
    """
    try:
        text = _content(place).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"the prompt file {place} cannot be read ({reason}); give a text file") from None
    if Path(place).suffix.lower() not in TABLES:
        return [text]
    # Not splitlines(): it also cuts at characters such as U+2028, which a JSON string may hold.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip(" \t\r")]
    if not lines:
        raise UserError(f"the prompt file {place} has no prompts; give a JSON object with the field 'prompt' a line")
    return [_prompt(line, f"line {number} of {place}") for number, line in lines]


def _content(place: str | Path) -> bytes:
    if str(place) != STDIN:
        return Path(place).read_bytes()
    # None where a shell closed it.
    return b"" if sys.stdin is None else sys.stdin.buffer.read()


def _prompt(line: str, where: str) -> str:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or "prompt" not in content:
        raise UserError(f"{where} is not right: every line must be a JSON object with the field 'prompt'")
    if not isinstance(content["prompt"], str):
        raise UserError(f"the prompt in {where} is {_short(content['prompt'])}; give a string")
    return content["prompt"]


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
