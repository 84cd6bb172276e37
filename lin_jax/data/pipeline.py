"""Documents to packed batches: shuffled, endless and resumable for training; few and fixed for validation.

A batch is `{"tokens": int32 [B, T+1], "documents": int32 [B, T+1]}`. Documents are put end to end and
cut into rows of T+1 tokens, inputs and targets overlapping by T. `documents` numbers the documents of a
row from 1, so that attention and state stop at their borders; 0 marks padding.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import grain
import numpy as np

from lin_jax.data.config import DataConfig
from lin_jax.data.sources import Document
from lin_jax.data.splitting import digest
from lin_jax.data.token_sources import TokenizedDocuments, TokenizedStream
from lin_jax.data.tokenizer import Tokenizer
from lin_jax.errors import UserError

if TYPE_CHECKING:
    from datasets import IterableDataset

Batch = dict[str, np.ndarray]

# Neighbouring rows come from one long document; within so many rows they are dealt out in random order.
_SHUFFLED_ROWS = 64
# Text in memory needs no crowd of readers; one thread tokenises ahead while a step runs.
READ_AHEAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=16)


class TrainingBatches:
    """An endless iterator over batches whose position is plain JSON.

    Args:
        batches: The grain iterator.
        identity: What the position is only valid for, by name.
    """

    def __init__(self, batches: grain.DatasetIterator, identity: dict[str, Any]):
        self._batches = batches
        self._identity = identity

    def __iter__(self) -> "TrainingBatches":
        return self

    def __next__(self) -> Batch:
        """Returns the next batch.

        Raises:
            UserError: a stream is empty or damaged.
        """
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """Returns the position after the batches seen so far, fit for `json.dumps`."""
        return {"identity": dict(self._identity), "position": self._batches.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a saved position, exactly, also after a round trip through JSON.

        Raises:
            UserError: the position was saved with another seed, corpus, tokenizer, sequence length or shard.
        """
        saved = state["identity"]
        for name, value in self._identity.items():
            if name not in saved or saved[name] != value:
                raise UserError(
                    f"the saved data position is for {name} {saved.get(name)} and this run has {value}: "
                    f"use the same {name}, or start a new run"
                )
        self._batches.set_state(_with_tuples(state["position"]))


def training_batches(
    documents: "Sequence[Document] | IterableDataset",
    tokenizer: Tokenizer,
    config: DataConfig,
    *,
    batch_size: int,
    seed: int,
    shard: tuple[int, int] = (0, 1),
) -> TrainingBatches:
    """Returns endless batches of packed rows; every epoch over documents in memory has a new order.

    A stream keeps its order, except that neighbouring rows are shuffled. The same arguments give the
    same batches.

    Args:
        documents: Documents in memory, or a stream of rows `{"text": str}`.
        tokenizer: Turns each document into ids, with its last token.
        config: Gives the sequence length T.
        batch_size: Rows a batch, B, of this process alone.
        seed: Order of documents and rows, from 0 to 2^31 - 1.
        shard: Which part of the documents this process reads, and of how many: `(index, count)`.

    Raises:
        UserError: a number is out of range, or there are fewer documents than shards.
    """
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size} must be 1 or more")
    if not 0 <= seed < 2**31:
        raise UserError(f"seed {seed} must lie between 0 and {2**31 - 1}")
    index, count = shard
    if not 0 <= index < count:
        raise UserError(f"shard {index} of {count} does not exist: give an index from 0 to {count - 1}")
    identity = {
        "seed": seed,
        "sequence_length": config.sequence_length,
        "tokenizer": tokenizer.fingerprint,
        "shard": f"{index} of {count}",
    }
    if isinstance(documents, Sequence):
        source = TokenizedDocuments(documents, tokenizer)
        identity["corpus"] = source.fingerprint()
        tokens = _in_memory(source, seed, index, count)
    else:
        tokens = TokenizedStream(_part_of_stream(documents, index, count), tokenizer)
    rows = _pack(tokens, config.sequence_length + 1)
    rows = grain.experimental.WindowShuffleIterDataset(rows, window_size=_SHUFFLED_ROWS, seed=seed)
    return TrainingBatches(iter(rows.batch(batch_size, drop_remainder=True)), identity)


def validation_batches(
    documents: "Sequence[Document] | IterableDataset",
    tokenizer: Tokenizer,
    config: DataConfig,
    *,
    batch_size: int,
) -> list[Batch]:
    """Returns at most `config.validation_batches` fixed batches of held-out text, all of full size.

    Documents in memory are taken in an order that mixes names; a stream is taken from its start. The
    last row, and rows missing from the last batch, are filled with tokens 0 and documents 0.

    Raises:
        UserError: there is no held-out text.
    """
    length = config.sequence_length + 1
    wanted = config.validation_batches * batch_size * length
    pieces, total = [], 0
    for text in _held_out_texts(documents):
        pieces.append(tokenizer.encode_document(text)[: wanted - total])
        total += len(pieces[-1])
        if total == wanted:
            break
    if total == 0:
        raise UserError(
            f"no text is held out: raise validation_fraction {config.validation_fraction}, or give more documents"
        )
    count = -(-total // (batch_size * length))
    padding = np.zeros(count * batch_size * length - total, np.int32)
    tokens = np.concatenate([*pieces, padding]).reshape(-1, length)
    owned = np.repeat(np.arange(1, len(pieces) + 1), [len(piece) for piece in pieces])
    owners = np.concatenate([owned, padding]).reshape(-1, length)
    numbers = np.where(owners > 0, owners - owners[:, :1] + 1, 0).astype(np.int32)
    return [
        {"tokens": tokens[start : start + batch_size], "documents": numbers[start : start + batch_size]}
        for start in range(0, len(tokens), batch_size)
    ]


def _in_memory(source: TokenizedDocuments, seed: int, index: int, count: int) -> grain.IterDataset:
    if len(source) < count:
        raise UserError(
            f"{len(source)} training documents cannot be dealt to {count} processes: set document_separator, "
            "give more documents, or use fewer processes"
        )
    # Shuffled before it is dealt out, so that a process sees other documents in every epoch.
    dealt = grain.MapDataset.source(source).shuffle(seed)[index::count]
    return dealt.repeat(None).to_iter_dataset(READ_AHEAD)


def _part_of_stream(stream: "IterableDataset", index: int, count: int) -> "IterableDataset":
    if count == 1:
        return stream
    from datasets.distributed import split_dataset_by_node

    return split_dataset_by_node(stream, rank=index, world_size=count)


def _pack(tokens: grain.IterDataset, length: int) -> grain.IterDataset:
    """Cuts `{"tokens": [N]}` put end to end into rows of `length`, and numbers the documents of each row."""
    packed = grain.experimental.ConcatThenSplitIterDataset(tokens, length_struct={"tokens": length})
    return packed.map(lambda row: {"tokens": row["tokens"], "documents": row["tokens_segment_ids"]})


def _held_out_texts(documents: "Sequence[Document] | IterableDataset") -> Iterator[str]:
    if isinstance(documents, Sequence):
        return iter(sorted((document.text for document in documents), key=digest))
    return (row["text"] for row in documents)


def _with_tuples(state: Any) -> Any:
    """Undoes what JSON does to grain's packing state: read as a list, an empty slice passes for a remainder.

    Without this a position saved where a row ends with its document would lose the next document.
    """
    if not isinstance(state, dict):
        return state
    return {
        name: {key: tuple(part) for key, part in value.items()} if name == "remainder_slices" else _with_tuples(value)
        for name, value in state.items()
    }
