"""Documents to packed batches for training: shuffled, endless, resumable, and the same on any number of processes.

A batch is `{"tokens": int32 [B, T+1], "documents": int32 [B, T+1]}`. Documents are put end to end and
cut into rows of T+1 tokens, inputs and targets overlapping by T. `documents` numbers the documents of a
row from 1, so that attention and state stop at their borders; 0 marks padding. Where rows are to be one
text each it is left out.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import grain

from lin_jax.data.config import DataConfig
from lin_jax.data.corpus import Corpus, Part
from lin_jax.data.dealing import DealtDocuments, Deck
from lin_jax.data.mixing import Ingredient, MixedRows, Row, SourceClock
from lin_jax.data.shards import ShardedRows, shards_of
from lin_jax.data.sources import Document
from lin_jax.data.token_sources import TokenizedStream, tokenized
from lin_jax.data.tokenizer import Tokenizer
from lin_jax.data.training_batches import TrainingBatches
from lin_jax.data.windows import ShuffledWindows
from lin_jax.errors import UserError

if TYPE_CHECKING:
    from datasets import IterableDataset

# Neighbouring rows come from one long document; within so many rows they are dealt out in random order.
_SHUFFLED_ROWS = 64
# Batches made ahead of the training loop, at least.
_READ_AHEAD = 4


class _Source(NamedTuple):
    """One part of a corpus: what stands for its text, if it is known whole, and its tokens for each shard."""

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
    dealt to `config.shards` shards, each of which gives `batch_size / shards` rows of every batch, side
    by side. A process opens only the shards that its rows come from. With one shard every process reads
    everything and keeps its own rows, which is right, but no faster than a single process.

    Args:
        documents: A corpus, or documents in memory, or a stream of rows `{"text": str}`.
        tokenizer: Turns each document into ids, with its last token.
        config: Gives the sequence length T, the shards, and the folder that keeps tokens.
        batch_size: Rows of the batch of all processes, B.
        seed: Order of documents and rows, from 0 to 2^31 - 1.
        rows: The rows of every batch to return: from, and to before; by default all.

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
    # Rows are read a window at a time: what was made ahead must last until the next one is there.
    depth = max(_READ_AHEAD, -(-_SHUFFLED_ROWS // rows_per_shard))
    return TrainingBatches(ShardedRows(shards, rows_per_shard, rows), identity, clock, depth)


def _check(batch_size: int, seed: int, rows: tuple[int, int]) -> None:
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size} must be 1 or more")
    if not 0 <= seed < 2**31:
        raise UserError(f"seed {seed} must lie between 0 and {2**31 - 1}")
    if not 0 <= rows[0] < rows[1] <= batch_size:
        raise UserError(f"rows {rows[0]} to {rows[1]} are not rows of a batch of {batch_size}: give 0 <= from < to")


def _source(part: Part, tokenizer: Tokenizer, config: DataConfig, seed: int) -> _Source:
    if not isinstance(part.documents, Sequence):
        return _Source(part.name, part.share, None, partial(_streamed, part, tokenizer, config.shards))
    found = tokenized(part.documents, tokenizer, config.cache)
    if len(found) < config.shards:
        raise UserError(
            f"{len(found)} training documents of {part.name} cannot be dealt to {config.shards} shards: set "
            "document_separator, give more documents, or use fewer shards"
        )
    tokens = partial(DealtDocuments, Deck(found, seed, config.shards))
    return _Source(part.name, part.share, found.fingerprint, tokens)


def _streamed(part: Part, tokenizer: Tokenizer, count: int, number: int) -> grain.IterDataset:
    from datasets.distributed import split_dataset_by_node

    if count == 1:
        return TokenizedStream(part.documents, tokenizer, part.name)
    stream = split_dataset_by_node(part.documents, rank=number, world_size=count)
    return TokenizedStream(stream, tokenizer, f"shard {number} of {count} of {part.name}")


def _shard(
    sources: Sequence[_Source], config: DataConfig, seed: int, number: int, clock: SourceClock
) -> grain.IterDataset:
    """The endless rows of one shard."""
    ingredients = [Ingredient(source.name, source.share, _pack(source.tokens(number), config)) for source in sources]
    # Shards mix alike: without an order of its own for each, a batch would have all its rows from one source.
    return ShuffledWindows(MixedRows(ingredients, clock), _SHUFFLED_ROWS, seed=(seed, number))


def _pack(tokens: grain.IterDataset, config: DataConfig) -> grain.IterDataset:
    """Cuts `{"tokens": [N]}` put end to end into rows of T+1, and numbers the documents of each row if it is to."""
    length = {"tokens": config.sequence_length + 1}
    packed = grain.experimental.ConcatThenSplitIterDataset(tokens, length_struct=length)
    return packed.map(_numbered if config.separate_documents else _plain)


def _numbered(row: dict[str, Any]) -> Row:
    return {"tokens": row["tokens"], "documents": row["tokens_segment_ids"]}


def _plain(row: dict[str, Any]) -> Row:
    return {"tokens": row["tokens"]}
