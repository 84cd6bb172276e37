"""Batches of a GLUE task: endless shuffled epochs that can be resumed for training, each split once for validation.

A batch is `{"tokens": int32 [B, T], "mask": int32 [B, T], "labels": [B]}`, for BERT with `types` `[B, T]`; labels are
int32 classes, or float32 numbers to predict. A batch for validation also has `split` `[B]`, the number of the split
that a row is from, -1 in rows that fill up the last batch.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lin_jax.data.glue.files import Example
from lin_jax.data.glue.tasks import Task
from lin_jax.data.glue.templates import Segment, pad_row, pair_template, truncate_longest_first
from lin_jax.data.loader.clock import SourceClock
from lin_jax.data.loader.loader import TrainingBatches
from lin_jax.data.loader.sharding import ShardedRows
from lin_jax.data.tokenizers.tokenizer import Tokenizer
from lin_jax.data.types import HostBatch, Row
from lin_jax.extras import require

# Rows are as long as the longest example, rounded up: shapes that devices like.
_MULTIPLE = 8
# Batches made ahead of the training loop.
_READ_AHEAD = 4


@dataclass(frozen=True)
class ExampleEncoder:
    """Encodes examples as rows for a model family.

    Attributes:
        family: of the model.
        tokenizer: of the model.
        task: of the examples.
        pad_id: token at padding.
        types: whether rows have `types`, which tell first and second text apart (BERT).
    """

    family: str
    tokenizer: Tokenizer
    task: Task
    pad_id: int = 0
    types: bool = False

    def segments(self, examples: Sequence[Example], length: int) -> list[list[Segment]]:
        """The segments of every example, truncated to at most `length` tokens.

        Raises:
            UserError: the tokenizer lacks a special token, or the length has no room for a text.
        """
        template = pair_template(self.family, self.tokenizer, self.task)
        texts = [text for example in examples for text in example.sentences]
        ids = iter(self.tokenizer.encode_batch(texts))
        return [truncate_longest_first(template([next(ids) for _ in each.sentences]), length) for each in examples]

    def row(self, segments: Sequence[Segment], label: float, length: int) -> Row:
        """A row of `length` tokens with its label."""
        dtype = np.float32 if self.task.is_regression else np.int32
        return {**pad_row(segments, length, self.pad_id, self.types), "labels": np.asarray(label, dtype)}


class ExampleRows:
    """Random access to rows of equal length.

    Args:
        encoder: makes rows of segments.
        examples: the examples.
        segments: their segments, from the encoder.
        length: tokens of a row.
    """

    def __init__(
        self, encoder: ExampleEncoder, examples: Sequence[Example], segments: Sequence[Sequence[Segment]], length: int
    ) -> None:
        self._encoder = encoder
        self._labels = [example.label for example in examples]
        self._segments = segments
        self._length = length

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Row:
        return self._encoder.row(self._segments[index], self._labels[index], self._length)

    def __repr__(self) -> str:
        return f"ExampleRows({len(self)})"


def row_length(splits: Iterable[Sequence[Sequence[Segment]]], most: int) -> int:
    """Tokens of the longest example of several splits, rounded up, and no more than `most`."""
    longest = max(sum(len(segment.ids) for segment in segments) for examples in splits for segments in examples)
    return min(-(-longest // _MULTIPLE) * _MULTIPLE, most)


def task_training_batches(
    rows: ExampleRows,
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
        rows: of the examples.
        examples: the same, whose digest a saved position is checked against.
        tokenizer: of the rows.
        length: tokens of a row.
        batch_size: rows of the batch of all processes, B.
        seed: order of the examples.
        wanted: the rows of every batch to return, from and to before; None returns all.

    Raises:
        UserError: grain is not installed.
    """
    grain = require("grain", "reading a task for training")
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


def task_validation_batches(splits: Sequence[ExampleRows], *, batch_size: int) -> list[HostBatch]:
    """Batches of all rows of some splits, one after another, the last one filled up with copies of its first row."""
    rows: list[Row] = [
        {**examples[index], "split": np.asarray(number, np.int32)}
        for number, examples in enumerate(splits)
        for index in range(len(examples))
    ]
    batches: list[HostBatch] = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        batch += [{**batch[0], "split": np.asarray(-1, np.int32)}] * (batch_size - len(batch))
        batches.append({name: np.stack([row[name] for row in batch]) for name in batch[0]})
    return batches


def _fingerprint(examples: Sequence[Example]) -> str:
    """Digest of all texts and labels in their order."""
    content = hashlib.blake2b(digest_size=8)
    for example in examples:
        content.update(repr((example.sentences, example.label)).encode())
    return content.hexdigest()
