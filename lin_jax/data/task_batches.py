"""Examples of a task to batches: epochs in random order that can be resumed for training, each set once to validate.

A batch is `{"tokens": int32 [B, T], "mask": int32 [B, T], "labels": [B]}`, for BERT with `types` `[B, T]`; labels are
int32 classes, or float32 numbers to predict. A batch to validate on also has `part` `[B]`, the number of the set that a
row is from, -1 in rows that fill up the last batch.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import grain
import numpy as np

from lin_jax.data.glue import Task
from lin_jax.data.glue_files import Example
from lin_jax.data.mixing import SourceClock
from lin_jax.data.pairs import Row, Segment, fitted, padded, pair_layout
from lin_jax.data.shards import Batch, ShardedRows
from lin_jax.data.tokenizer import Tokenizer
from lin_jax.data.training_batches import TrainingBatches

# Rows are as long as the longest example, rounded up: shapes that devices like.
_MULTIPLE = 8
# Batches made ahead of the training loop.
_READ_AHEAD = 4


@dataclass(frozen=True)
class Reader:
    """How examples become rows.

    Attributes:
        family: of the model.
        tokenizer: of the model.
        task: of the examples.
        pad: stands where rows have no token.
        types: whether the model tells first and second text apart by `types`.
    """

    family: str
    tokenizer: Tokenizer
    task: Task
    pad: int = 0
    types: bool = False

    def segments(self, examples: Sequence[Example], length: int) -> list[list[Segment]]:
        """The segments of every example, shortened to at most `length` tokens.

        Raises:
            UserError: the tokenizer lacks a special token, or the length has no room for a text.
        """
        layout = pair_layout(self.family, self.tokenizer, self.task)
        texts = [text for example in examples for text in example.sentences]
        ids = iter(self.tokenizer.encode_batch(texts))
        return [fitted(layout([next(ids) for _ in example.sentences]), length) for example in examples]

    def row(self, segments: Sequence[Segment], label: float, length: int) -> Row:
        """A row with its label."""
        dtype = np.float32 if self.task.is_regression else np.int32
        return {**padded(segments, length, self.pad, self.types), "labels": np.asarray(label, dtype)}


class Rows:
    """Random access to rows of equal length.

    Args:
        reader: Makes rows of examples.
        examples: The examples.
        segments: Their segments, from the reader.
        length: Tokens of a row.
    """

    def __init__(
        self, reader: Reader, examples: Sequence[Example], segments: Sequence[Sequence[Segment]], length: int
    ) -> None:
        self._reader = reader
        self._labels = [example.label for example in examples]
        self._segments = segments
        self._length = length

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Row:
        return self._reader.row(self._segments[index], self._labels[index], self._length)

    def __repr__(self) -> str:
        return f"Rows({len(self)})"


def row_length(each: Iterable[Sequence[Sequence[Segment]]], most: int) -> int:
    """Tokens of the longest example of several sets, rounded up, and no more than `most`."""
    longest = max(sum(len(segment.ids) for segment in segments) for examples in each for segments in examples)
    return min(-(-longest // _MULTIPLE) * _MULTIPLE, most)


def task_training_batches(
    rows: Rows,
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    length: int,
    batch_size: int,
    seed: int,
    wanted: tuple[int, int] | None = None,
) -> TrainingBatches:
    """Endless batches; every epoch has a new order, and a batch may begin in one epoch and end in the next.

    Args:
        rows: Of the examples.
        examples: The same, for the position to know what it is a position in.
        tokenizer: Of the rows.
        length: Tokens of a row.
        batch_size: Rows of the batch of all processes, B.
        seed: Order of the examples.
        wanted: The rows of every batch to return: from, and to before; by default all.
    """
    identity = {
        "seed": seed,
        "sequence_length": length,
        "tokenizer": tokenizer.fingerprint,
        "shards": 1,
        "corpus": _fingerprint(examples),
    }
    order = grain.MapDataset.source(rows).shuffle(seed).repeat(None)
    # The batches' own thread reads ahead; another one here would only be in its way.
    read = iter(order.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
    shards = ShardedRows({0: read}, batch_size, wanted or (0, batch_size))
    return TrainingBatches(shards, identity, SourceClock("the task's examples"), _READ_AHEAD)


def task_validation_batches(sets: Sequence[Rows], *, batch_size: int) -> list[Batch]:
    """Batches of all rows of some sets, one after another, the last one filled up with copies of its first row."""
    rows: list[Row] = [
        {**each[number], "part": np.asarray(part, np.int32)}
        for part, each in enumerate(sets)
        for number in range(len(each))
    ]
    batches: list[Batch] = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        batch += [{**batch[0], "part": np.asarray(-1, np.int32)}] * (batch_size - len(batch))
        batches.append({name: np.stack([row[name] for row in batch]) for name in batch[0]})
    return batches


def _fingerprint(examples: Sequence[Example]) -> str:
    """Stands for all texts and labels in their order."""
    content = hashlib.blake2b(digest_size=8)
    for example in examples:
        content.update(repr((example.sentences, example.label)).encode())
    return content.hexdigest()
