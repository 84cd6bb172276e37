"""Templates that put a text, or a pair of texts, into one row of tokens in the format of each model family.

A row is `{"tokens": int32 [T], "mask": int32 [T]}`, the mask zero at padding, and for BERT `types` `[T]`, zero in the
first text and one in the second.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lin_jax.data.glue.tasks import Task
from lin_jax.data.tokenizers.tokenizer import Tokenizer
from lin_jax.data.types import Row
from lin_jax.errors import UserError

Ids = Sequence[int] | np.ndarray


class Segment(NamedTuple):
    """A part of a row: special tokens, a prompt, or a text.

    Attributes:
        ids: its tokens.
        type_id: 0, or 1 in the second text.
        truncatable: whether it may be truncated at its end.
    """

    ids: Ids
    type_id: int = 0
    truncatable: bool = False


# Puts the ids of one or two texts into a row.
Template = Callable[[Sequence[Ids]], list[Segment]]


def _bert(tokenizer: Tokenizer, task: Task) -> Template:
    """`[CLS] a [SEP]`, `[CLS] a [SEP] b [SEP]` (Devlin et al. 2019)."""
    cls, sep = (_special(tokenizer, name, "BERT") for name in ("cls_token", "sep_token"))

    def template(texts: Sequence[Ids]) -> list[Segment]:
        segments = [Segment([cls])]
        for type_id, ids in enumerate(texts):
            segments += [Segment(ids, type_id, truncatable=True), Segment([sep], type_id)]
        return segments

    return template


def _gpt2(tokenizer: Tokenizer, task: Task) -> Template:
    """`a END`, `a END b END`: the class is read off the last token."""
    end = _special(tokenizer, "eos_token", "GPT-2")

    def template(texts: Sequence[Ids]) -> list[Segment]:
        return [segment for ids in texts for segment in (Segment(ids, truncatable=True), Segment([end]))]

    return template


def _t5(tokenizer: Tokenizer, task: Task) -> Template:
    """`mrpc sentence1: a sentence2: b END`, names in alphabetical order (Raffel et al. 2020)."""
    end = _special(tokenizer, "eos_token", "T5")
    order = sorted(range(len(task.sentences)), key=lambda number: task.sentences[number].hub)
    marks = [tokenizer.encode(f"{task.sentences[number].hub}:").tolist() for number in order]
    begin = tokenizer.encode(task.name).tolist()

    def template(texts: Sequence[Ids]) -> list[Segment]:
        segments = [Segment(begin)]
        for mark, number in zip(marks, order, strict=True):
            segments += [Segment(mark), Segment(texts[number], truncatable=True)]
        return [*segments, Segment([end])]

    return template


_TEMPLATES = {"bert": _bert, "gpt2": _gpt2, "t5": _t5}


def pair_template(family: str, tokenizer: Tokenizer, task: Task) -> Template:
    """The template of a model family for a task's texts.

    Raises:
        UserError: the tokenizer lacks a special token of the template.
    """
    return _TEMPLATES[family](tokenizer, task)


def _special(tokenizer: Tokenizer, name: str, family: str) -> int:
    found = tokenizer.special_id(name)
    if found is None:
        raise UserError(
            f"the tokenizer has no {name}, which {family} needs around its texts; give the data.tokenizer of a {family}"
        )
    return found


def truncate_longest_first(segments: Sequence[Segment], length: int) -> list[Segment]:
    """Truncates segments to `length` tokens in all, always at the end of the longest that may be truncated.

    Raises:
        UserError: the segments that may not be truncated leave no room.
    """
    fixed = sum(len(segment.ids) for segment in segments if not segment.truncatable)
    room = length - fixed
    if room < 1:
        raise UserError(f"data.sequence_length {length} has no room for a text; give more than {fixed}")
    counts = iter(_truncated_lengths([len(each.ids) for each in segments if each.truncatable], room))
    return [each._replace(ids=each.ids[: next(counts)]) if each.truncatable else each for each in segments]


def _truncated_lengths(lengths: Sequence[int], room: int) -> list[int]:
    """Lengths after the longest one (the later of equals) has lost a token at a time until all fit."""
    left = list(lengths)
    while sum(left) > room:
        longest = max(range(len(left)), key=lambda number: (left[number], number))
        left[longest] -= 1
    return left


def pad_row(segments: Sequence[Segment], length: int, pad_id: int, types: bool) -> Row:
    """Puts segments into a row of `length` tokens, padded on the right."""
    ids = np.concatenate([np.asarray(segment.ids, np.int32) for segment in segments])
    type_ids = np.repeat([segment.type_id for segment in segments], [len(segment.ids) for segment in segments])
    tail = length - len(ids)
    row: Mapping[str, np.ndarray] = {
        "tokens": np.pad(ids, (0, tail), constant_values=pad_id),
        "mask": np.pad(np.ones(len(ids), np.int32), (0, tail)),
    }
    return {**row, "types": np.pad(type_ids.astype(np.int32), (0, tail))} if types else dict(row)
