"""A text, or a pair of texts, as one row of tokens, the way each model family was taught to read them.

A row is `{"tokens": int32 [T], "mask": int32 [T]}`, the mask zero at padding, and for BERT `types` `[T]`, zero in the
first text and one in the second.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lin_jax.data.glue import Task
from lin_jax.data.tokenizer import Tokenizer
from lin_jax.errors import UserError

Row = dict[str, np.ndarray]
Ids = Sequence[int] | np.ndarray


class Segment(NamedTuple):
    """A part of a row.

    Attributes:
        ids: its tokens.
        kind: 0, or 1 in the second text.
        cut: whether it may be shortened from its end.
    """

    ids: Ids
    kind: int = 0
    cut: bool = False


Layout = Callable[[Sequence[Ids]], list[Segment]]


def _bert(tokenizer: Tokenizer, task: Task) -> Layout:
    """`[CLS] a [SEP]`, `[CLS] a [SEP] b [SEP]` (Devlin et al. 2019)."""
    cls, sep = (_special(tokenizer, name, "BERT") for name in ("cls_token", "sep_token"))

    def layout(texts: Sequence[Ids]) -> list[Segment]:
        segments = [Segment([cls])]
        for kind, ids in enumerate(texts):
            segments += [Segment(ids, kind, cut=True), Segment([sep], kind)]
        return segments

    return layout


def _gpt2(tokenizer: Tokenizer, task: Task) -> Layout:
    """`a END`, `a END b END`: the model says its class at the last one."""
    end = _special(tokenizer, "eos_token", "GPT-2")

    def layout(texts: Sequence[Ids]) -> list[Segment]:
        return [segment for ids in texts for segment in (Segment(ids, cut=True), Segment([end]))]

    return layout


def _t5(tokenizer: Tokenizer, task: Task) -> Layout:
    """`mrpc sentence1: a sentence2: b END`, names in alphabetical order (Raffel et al. 2020)."""
    end = _special(tokenizer, "eos_token", "T5")
    order = sorted(range(len(task.sentences)), key=lambda number: task.sentences[number].hub)
    marks = [tokenizer.encode(f"{task.sentences[number].hub}:").tolist() for number in order]
    begin = tokenizer.encode(task.name).tolist()

    def layout(texts: Sequence[Ids]) -> list[Segment]:
        segments = [Segment(begin)]
        for mark, number in zip(marks, order, strict=True):
            segments += [Segment(mark), Segment(texts[number], cut=True)]
        return [*segments, Segment([end])]

    return layout


_LAYOUTS = {"bert": _bert, "gpt2": _gpt2, "t5": _t5}


def pair_layout(family: str, tokenizer: Tokenizer, task: Task) -> Layout:
    """How a family's models read texts that are tokens already.

    Raises:
        UserError: the tokenizer lacks a special token that they need.
    """
    return _LAYOUTS[family](tokenizer, task)


def _special(tokenizer: Tokenizer, name: str, family: str) -> int:
    found = tokenizer.special_id(name)
    if found is None:
        raise UserError(
            f"the tokenizer has no {name}, which {family} needs around its texts; give data.tokenizer, one for {family}"
        )
    return found


def fitted(segments: Sequence[Segment], length: int) -> list[Segment]:
    """Segments shortened to `length` tokens in all, from the ends of the longest that may be.

    Raises:
        UserError: what may not be shortened is longer already.
    """
    fixed = sum(len(segment.ids) for segment in segments if not segment.cut)
    room = length - fixed
    if room < 1:
        raise UserError(f"data.sequence_length {length} has no room for a text; give more than {fixed}")
    counts = iter(_shares([len(segment.ids) for segment in segments if segment.cut], room))
    return [segment._replace(ids=segment.ids[: next(counts)]) if segment.cut else segment for segment in segments]


def _shares(lengths: Sequence[int], room: int) -> list[int]:
    """What is left of each length when the longest one (the later of equals) loses one until all fit."""
    left = list(lengths)
    while sum(left) > room:
        longest = max(range(len(left)), key=lambda number: (left[number], number))
        left[longest] -= 1
    return left


def padded(segments: Sequence[Segment], length: int, pad: int, types: bool) -> Row:
    """A row of `length` tokens."""
    ids = np.concatenate([np.asarray(segment.ids, np.int32) for segment in segments])
    kinds = np.repeat([segment.kind for segment in segments], [len(segment.ids) for segment in segments])
    tail = length - len(ids)
    row: Mapping[str, np.ndarray] = {
        "tokens": np.pad(ids, (0, tail), constant_values=pad),
        "mask": np.pad(np.ones(len(ids), np.int32), (0, tail)),
    }
    return {**row, "types": np.pad(kinds.astype(np.int32), (0, tail))} if types else dict(row)
