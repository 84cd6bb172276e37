"""Documents to packed batches for training: shuffled, endless, resumable, and the same on any number of processes.

A batch is `{"tokens": int32 [B, T+1], "segment_ids": int32 [B, T+1]}`. Documents are concatenated and
split into rows of T+1 tokens, inputs and targets overlapping by T. `segment_ids` numbers the documents of a
row from 1, so that attention and state stop at document boundaries; 0 marks padding. It is left out where
`separate_documents` is false and a row is one text. With instruction data there is `loss_mask` beside them, 1 where a
token is a target.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lin_jax.data.config import DataConfig
from lin_jax.data.loader.clock import SourceClock
from lin_jax.data.loader.loader import TrainingBatches
from lin_jax.data.loader.sharding import ShardedRows, shards_of
from lin_jax.data.sources.corpus import Corpus
from lin_jax.data.sources.text import Document
from lin_jax.data.tokenizers.tokenizer import Tokenizer
from lin_jax.errors import UserError
from lin_jax.extras import require

if TYPE_CHECKING:
    from datasets import IterableDataset

# Batches made ahead of the training loop, at least.
_READ_AHEAD = 4


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
        UserError: a number is out of range, there are fewer documents than shards, or grain is not installed.
    """
    rows = (0, batch_size) if rows is None else rows
    _check(batch_size, seed, rows)
    require("grain", "reading text for training")
    # Grain takes its time to import, and decoding does not need it.
    from lin_jax.data.loader.shards import SHUFFLED_ROWS, open_source, shard_rows

    rows_per_shard = config.rows_per_shard(batch_size)
    sources = [open_source(part, tokenizer, config, seed) for part in Corpus.of(documents).parts]
    clock = SourceClock(sources[0].name)
    shards = {
        number: iter(shard_rows(sources, config, seed, number, clock)) for number in shards_of(rows, rows_per_shard)
    }
    identity = {
        "seed": seed,
        "sequence_length": config.sequence_length,
        "tokenizer": tokenizer.fingerprint,
        "shards": config.shards,
        "mixture": [source.share for source in sources],
        "corpus": [source.fingerprint for source in sources],
    }
    # Rows are read a window at a time: the batches made ahead must last until the next window is there.
    depth = max(_READ_AHEAD, -(-SHUFFLED_ROWS // rows_per_shard))
    return TrainingBatches(ShardedRows(shards, rows_per_shard, rows), identity, clock, depth)


def _check(batch_size: int, seed: int, rows: tuple[int, int]) -> None:
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size} is too small; give 1 or more")
    if not 0 <= seed < 2**31:
        raise UserError(f"seed {seed} is out of range; give one from 0 to {2**31 - 1}")
    if not 0 <= rows[0] < rows[1] <= batch_size:
        raise UserError(f"rows {rows[0]} to {rows[1]} are not rows of a batch of {batch_size}; give 0 <= from < to")
