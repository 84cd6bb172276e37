"""Sources of a run as grain's data sets: the endless rows of each shard."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import grain

from lin_jax.data.config import TEXT, DataConfig
from lin_jax.data.loader.clock import SourceClock
from lin_jax.data.loader.epochs import EpochDocuments, EpochShuffle
from lin_jax.data.loader.mixture import MixedRows, MixtureSource
from lin_jax.data.loader.window_shuffle import ShuffledWindows
from lin_jax.data.sources.corpus import CorpusPart
from lin_jax.data.tokenizers.tokenizer import Tokenizer
from lin_jax.data.tokens.examples import ExampleTokens, counted
from lin_jax.data.tokens.stream import TokenizedStream
from lin_jax.data.tokens.tokenized import tokenized
from lin_jax.data.types import Row, TokenSource
from lin_jax.errors import UserError

# Neighbouring rows come from one long document; within a window of so many rows they are shuffled.
SHUFFLED_ROWS = 64


class ShardedSource(NamedTuple):
    """One part of a corpus: the digest of its text, None for a stream, and its tokens for each shard."""

    name: str
    share: float
    fingerprint: str | None
    tokens: Callable[[int], grain.IterDataset]


def open_source(part: CorpusPart, tokenizer: Tokenizer, config: DataConfig, seed: int) -> ShardedSource:
    """Opens a part of a corpus: its tokens, shard by shard.

    Raises:
        UserError: it has fewer documents than there are shards.
    """
    if not isinstance(part.documents, Sequence):
        return ShardedSource(part.name, part.share, None, partial(_streamed, part, tokenizer, config.shards))
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
    return ShardedSource(part.name, part.share, found.fingerprint, tokens)


def _streamed(part: CorpusPart, tokenizer: Tokenizer, count: int, number: int) -> grain.IterDataset:
    from datasets.distributed import split_dataset_by_node

    if count == 1:
        return TokenizedStream(part.documents, tokenizer, part.name, examples=part.format != TEXT)
    stream = split_dataset_by_node(part.documents, rank=number, world_size=count)
    name = f"shard {number} of {count} of {part.name}"
    return TokenizedStream(stream, tokenizer, name, examples=part.format != TEXT)


def shard_rows(
    sources: Sequence[ShardedSource], config: DataConfig, seed: int, number: int, clock: SourceClock
) -> grain.IterDataset:
    """The endless rows of one shard."""
    masked = config.has_loss_mask
    mixed = [
        MixtureSource(source.name, source.share, pack(source.tokens(number), config, masked)) for source in sources
    ]
    # Shards mix alike: without an order of its own for each, a batch would have all its rows from one source.
    return ShuffledWindows(MixedRows(mixed, clock), SHUFFLED_ROWS, seed=(seed, number))


def pack(tokens: grain.IterDataset, config: DataConfig, masked: bool = False) -> grain.IterDataset:
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
