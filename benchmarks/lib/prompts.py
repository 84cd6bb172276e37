"""Real prompts of many lengths, from a data folder: questions, programs to complete, stories and articles.

The folder holds `mt_bench/question_even.jsonl` and `spec_bench/question_even.jsonl` (questions with even numbers),
`human_eval/HumanEval.jsonl.gz`, `tinystories/v2_train_head.txt.xz` (the beginning of TinyStoriesV2-GPT4-train.txt) and
`wikitext-2/valid.txt.xz`.
"""

import gzip
import json
import lzma
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lin_jax.errors import UserError

# Stories and paragraphs, of each at least so many; there are thousands.
FILLING = 80


class Prompt(NamedTuple):
    """Beginning of a real text.

    Attributes:
        source: the collection that it is from.
        tokens: its ids, whatever begins a text included.
    """

    source: str
    tokens: list[int]


def read_prompts(
    data: Path | None, encode: Callable[[str], list[int]], count: int | None = None, *, longest: int = 80, seed: int = 0
) -> list[Prompt]:
    """Prompts from all sources, in random order, cut to lengths drawn uniformly from 1 to `longest` tokens.

    Args:
        data: the data folder.
        encode: token ids of a text that begins a document.
        count: number of prompts; None takes every question and program, and 80 stories and paragraphs each.
        longest: tokens of the longest.
        seed: of order and lengths.

    Raises:
        UserError: a file is missing, or there are not as many texts.
    """
    texts = read_texts(data, max(FILLING, (count or 0) // 2))
    if count is not None and not 1 <= count <= len(texts):
        raise UserError(f"{count} prompts were asked for; give a number from 1 to {len(texts)}")
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, len(texts)).tolist()
    chosen = rng.permutation(len(texts))[: count or len(texts)]
    return [Prompt(texts[number][0], encode(texts[number][1])[: lengths[number]]) for number in chosen]


def by_source(prompts: Sequence[Prompt]) -> dict[str, int]:
    """Number of prompts by source."""
    return dict(sorted(Counter(prompt.source for prompt in prompts).items()))


def read_texts(data: Path | None, filling: int = FILLING) -> list[tuple[str, str]]:
    """Texts with the names of their sources; none occurs twice. Of stories and paragraphs `filling` each.

    Raises:
        UserError: no folder is named, or a file is missing.
    """
    if data is None:
        raise UserError(f"real texts are read from a folder with {', '.join(SOURCES)}; give one with --data")
    limits = {"tinystories": filling, "wikitext-2": filling}
    texts: dict[str, str] = {}
    for source, read in SOURCES.items():
        try:
            found = [text for text in read(data) if text not in texts]
        except OSError as error:
            raise UserError(
                f"{error.filename} cannot be read ({error.strerror}); name the folder with --data"
            ) from None
        texts |= dict.fromkeys(found[: limits.get(source)], source)
    return [(source, text) for text, source in texts.items()]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def _first_turns(path: Path) -> Iterator[str]:
    return (line["turns"][0] for line in _lines(path))


def _programs(data: Path) -> Iterator[str]:
    with gzip.open(data / "human_eval" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        yield from (json.loads(line)["prompt"].strip() for line in file)


def _stories(data: Path) -> Iterator[str]:
    with lzma.open(data / "tinystories" / "v2_train_head.txt.xz", "rt", encoding="utf-8") as file:
        yield from filter(None, (story.strip() for story in file.read().split("<|endoftext|>")))


def _paragraphs(data: Path) -> Iterator[str]:
    """Paragraphs that are long enough to be prompts, no headings."""
    with lzma.open(data / "wikitext-2" / "valid.txt.xz", "rt", encoding="utf-8") as file:
        yield from (line.strip() for line in file if len(line) > 200)


# MT-bench's questions are Spec-Bench's too; they count as the former's.
SOURCES: dict[str, Callable[[Path], Iterator[str]]] = {
    "mt_bench": lambda data: _first_turns(data / "mt_bench" / "question_even.jsonl"),
    "spec_bench": lambda data: _first_turns(data / "spec_bench" / "question_even.jsonl"),
    "human_eval": _programs,
    "tinystories": _stories,
    "wikitext-2": _paragraphs,
}
