"""Documents to packed batches for training: shuffled, endless, resumable, and the same on any number of processes.

A batch is `{"tokens": int32 [B, T+1], "segment_ids": int32 [B, T+1]}`. Documents are concatenated and
split into rows of T+1 tokens, inputs and targets overlapping by T. `segment_ids` numbers the documents of a
row from 1, so that attention and state stop at document boundaries; 0 marks padding. It is left out where
`separate_documents` is false and a row is one text. With instruction data there is `loss_mask` beside them, 1 where a
token is a target.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import grain

from lin_jax.data.config import TEXT, DataConfig
from lin_jax.data.loader.epochs import EpochDocuments, EpochShuffle
from lin_jax.data.loader.loader import TrainingBatches
from lin_jax.data.loader.mixture import MixedRows, MixtureSource, SourceClock
from lin_jax.data.loader.sharding import ShardedRows, shards_of
from lin_jax.data.loader.window_shuffle import ShuffledWindows
from lin_jax.data.sources.corpus import Corpus, CorpusPart
from lin_jax.data.sources.text import Document
from lin_jax.data.tokenizers.tokenizer import Tokenizer
from lin_jax.data.tokens.examples import ExampleTokens, counted
from lin_jax.data.tokens.tokenized import TokenizedStream, tokenized
from lin_jax.data.types import Row, TokenSource
from lin_jax.errors import UserError

if TYPE_CHECKING:
    from datasets import IterableDataset

# Neighbouring rows come from one long document; within a window of so many rows they are shuffled.
_SHUFFLED_ROWS = 64
# Batches made ahead of the training loop, at least.
_READ_AHEAD = 4


class _ShardedSource(NamedTuple):
    """One part of a corpus: the digest of its text, None for a stream, and its tokens for each shard."""

    name: str
    share: float
    fingerprint: str | None
    tokens: Callable[[int], grain.IterDataset]


def training_batches(
    documents: "Corpus | Sequence[Document] | IterableDataset",
    tokenizer: Tokenizer,
    config: DataConfig,
    *,
    batch_size: int,
    seed: int,
    rows: tuple[int, int] | None = None,
) -> TrainingBatches:
    """Returns endless batches of packed rows; every epoch over documents in memory has a new order.

    A stream keeps its order, except that neighbouring rows are shuffled. The same arguments give the
    same batches, and processes that ask for different rows get rows of the same batches. Documents are
    distributed over `config.shards` shards, each of which gives `batch_size / shards` contiguous rows of
    every batch. A process opens only the shards that its rows come from. With one shard every process reads
    everything and keeps its own rows, which is correct, but no faster than a single process.

    Args:
        documents: a corpus, or documents in memory, or a stream of rows `{"text": str}`.
        tokenizer: encodes each document, with its end token.
        config: gives the sequence length T, the shards, and the folder that keeps tokens.
        batch_size: rows of the batch of all processes, B.
        seed: order of documents and rows, from 0 to 2^31 - 1.
        rows: the rows of every batch to return, from and to before; None returns all.

    Raises:
        UserError: a number is out of range, or there are fewer documents than shards.
    """
    rows = (0, batch_size) if rows is None else rows
    _check(batch_size, seed, rows)
    rows_per_shard = config.rows_per_shard(batch_size)
    sources = [_source(part, tokenizer, config, seed) for part in Corpus.of(documents).parts]
    clock = SourceClock(sources[0].name)
    shards = {number: iter(_shard(sources, config, seed, number, clock)) for number in shards_of(rows, rows_per_shard)}
    identity = {
        "seed": seed,
        "sequence_length": config.sequence_length,
        "tokenizer": tokenizer.fingerprint,
        "shards": config.shards,
        "mixture": [source.share for source in sources],
        "corpus": [source.fingerprint for source in sources],
    }
    # Rows are read a window at a time: the batches made ahead must last until the next window is there.
    depth = max(_READ_AHEAD, -(-_SHUFFLED_ROWS // rows_per_shard))
    return TrainingBatches(ShardedRows(shards, rows_per_shard, rows), identity, clock, depth)


def _check(batch_size: int, seed: int, rows: tuple[int, int]) -> None:
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size} is too small; give 1 or more")
    if not 0 <= seed < 2**31:
        raise UserError(f"seed {seed} is out of range; give one from 0 to {2**31 - 1}")
    if not 0 <= rows[0] < rows[1] <= batch_size:
        raise UserError(f"rows {rows[0]} to {rows[1]} are not rows of a batch of {batch_size}; give 0 <= from < to")


def _source(part: CorpusPart, tokenizer: Tokenizer, config: DataConfig, seed: int) -> _ShardedSource:
    if not isinstance(part.documents, Sequence):
        return _ShardedSource(part.name, part.share, None, partial(_streamed, part, tokenizer, config.shards))
    found: TokenSource = (
        tokenized(part.documents, tokenizer, config.cache)
        if part.format == TEXT
        else ExampleTokens(part.documents, tokenizer)
    )
    if len(found) < config.shards:
        raise UserError(
            f"{len(found)} training documents of {part.name} are fewer than {config.shards} shards; set "
            "document_separator, give more documents, or use fewer shards"
        )
    tokens = partial(EpochDocuments, EpochShuffle(found, seed, config.shards))
    return _ShardedSource(part.name, part.share, found.fingerprint, tokens)


def _streamed(part: CorpusPart, tokenizer: Tokenizer, count: int, number: int) -> grain.IterDataset:
    from datasets.distributed import split_dataset_by_node

    if count == 1:
        return TokenizedStream(part.documents, tokenizer, part.name, examples=part.format != TEXT)
    stream = split_dataset_by_node(part.documents, rank=number, world_size=count)
    name = f"shard {number} of {count} of {part.name}"
    return TokenizedStream(stream, tokenizer, name, examples=part.format != TEXT)


def _shard(
    sources: Sequence[_ShardedSource], config: DataConfig, seed: int, number: int, clock: SourceClock
) -> grain.IterDataset:
    """The endless rows of one shard."""
    masked = config.has_loss_mask
    mixed = [
        MixtureSource(source.name, source.share, _pack(source.tokens(number), config, masked)) for source in sources
    ]
    # Shards mix alike: without an order of its own for each, a batch would have all its rows from one source.
    return ShuffledWindows(MixedRows(mixed, clock), _SHUFFLED_ROWS, seed=(seed, number))


def _pack(tokens: grain.IterDataset, config: DataConfig, masked: bool = False) -> grain.IterDataset:
    """Concatenates `{"tokens": [N]}` and splits them into rows of T+1, with `segment_ids` if documents are separate.

    If some source has loss masks, those that have none get one, all of whose tokens count.
    """
    length = {"tokens": config.sequence_length + 1}
    if masked:
        length["loss_mask"] = config.sequence_length + 1
        tokens = tokens.map(lambda row: row if "loss_mask" in row else counted(row))
    packed = grain.experimental.ConcatThenSplitIterDataset(tokens, length_struct=length)
    return packed.map(_numbered if config.separate_documents else _plain)


def _numbered(row: dict[str, Any]) -> Row:
    return {**_plain(row), "segment_ids": row["tokens_segment_ids"]}


def _plain(row: dict[str, Any]) -> Row:
    return {name: row[name] for name in ("tokens", "loss_mask") if name in row}
